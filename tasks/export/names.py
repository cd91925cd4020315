"""What the signatures of an exported file, their inputs and outputs are called."""

FILE = "model.tflite"

IDS = "input_ids"
MASK = "attention_mask"
FEATURES = "input_features"
SAMPLES = "input_values"
DECODER_IDS = "decoder_input_ids"
POSITION = "position"
COUNT = "count"
LOGITS = "logits"

SCORE = "serving_default"
PREFILL = "prefill"
DECODE = "decode"
ENCODE = "encode"

ONNX_FILE = "model.onnx"
ONNX_ENCODER = "encoder_model.onnx"
ONNX_DECODER = "decoder_model.onnx"
ONNX_WEIGHTS = "weights.bin"
"""The files of an ONNX export: one graph, or an encoder and a decoder that share their weights."""

PAST = "past_key_values"
PRESENT = "present"
CROSS = "cross"
"""Before the number of the layer in the names of keys and values: what a decoder is given, what it gives, and what its
cross-attention looks at."""


def cached(prefix: str, layers: int) -> tuple[str, ...]:
    """The names of the keys and values of so many layers."""
    return tuple(f"{prefix}.{layer}.{part}" for layer in range(layers) for part in ("key", "value"))
