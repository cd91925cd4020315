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
