"""Export of a model to the file that a device runs."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from specs.schema.base import RUNTIME_BYTES, FieldError, Kind, StepSpec
from specs.schema.units import Duration

Npu = Literal[
    "ethos-u55-32",
    "ethos-u55-64",
    "ethos-u55-128",
    "ethos-u55-256",
    "ethos-u65-256",
    "ethos-u65-512",
    "ethos-u85-128",
    "ethos-u85-256",
    "ethos-u85-512",
    "ethos-u85-1024",
    "ethos-u85-2048",
]


class ExportTfliteSpec(StepSpec):
    """Write the model as a LiteRT (TFLite) file with fixed shapes. A classifier takes ids and mask and gives logits; a
    decoder does that, and writes with a KV cache; a translation model and Whisper read and write by two signatures,
    encode and decode; a CTC model takes samples. ``int8`` is full static int8, calibrated on the training data; with
    ``npu`` vela compiles that file for an Arm Ethos-U."""

    makes: ClassVar[tuple[Kind, ...]] = ("export",)

    uses: Literal["export_tflite"]
    precision: Literal["float32", "int8-dynamic", "int4-block32", "int4-block64", "int4-block128", "int8"] = Field(
        default="float32",
        description="weights and activations of the file; int8-dynamic and int4 keep float activations",
    )
    length: int | None = Field(
        default=None,
        gt=0,
        le=1_000_000,
        examples=["128"],
        description="tokens of the input, where it is text; default: data.max_length",
    )
    duration: Duration | None = Field(
        default=None,
        gt=0,
        examples=["2 s"],
        description="seconds of audio that a CTC model's file takes, for example 2 s; longer audio is cut; default: "
        "the longest training recording. Whisper has its own",
    )
    batch: int = Field(default=1, gt=0, description="examples of the input; text is written one at a time in any case")
    generation: bool | None = Field(
        default=None,
        examples=["true"],
        description="text-generation: whether the file also writes with a KV cache, by the signatures prefill and "
        "decode; default: yes, but not for an NPU, which compiles one graph",
    )
    cache: int | None = Field(
        default=None,
        gt=1,
        examples=["256"],
        description="tokens that the KV cache holds: prompt and continuation (text-generation; default: length), or "
        "what is written (translation; default: data.max_target_length; Whisper; default: data.max_length)",
    )
    calibration_samples: int = Field(
        default=200, gt=0, description="training examples that set the activation ranges (precision int8)"
    )
    npu: Npu | None = Field(default=None, description="compile for this NPU with vela (precision int8); default: none")
    npu_system_config: str | None = Field(
        default=None,
        min_length=1,
        examples=["Ethos_U85_SYS_DRAM_Mid"],
        description="vela's system configuration; default: the one of the target",
    )
    npu_memory_mode: str | None = Field(
        default=None,
        min_length=1,
        examples=["Shared_Sram"],
        description="vela's memory mode; default: the one of the target",
    )

    @property
    def generates(self) -> bool:
        """Whether a decoder's file is to write with a cache."""
        return self.npu is None if self.generation is None else self.generation

    def gives(self, taken: tuple[Kind, ...]) -> Kind:
        return "export"

    def measurable(self, kind: Kind, taken: tuple[frozenset[str], ...]) -> frozenset[str]:
        return frozenset(("any", "derived", "npu") if self.npu is not None else ("any", "derived"))

    def estimate(self, model: int) -> tuple[int, int]:
        # The converter holds the float graph several times.
        shrink = {"float32": 1, "int8-dynamic": 4, "int8": 4}.get(self.precision, 7)
        return model // shrink * (2 if self.npu else 1), 6 * model + 2 * RUNTIME_BYTES

    @model_validator(mode="after")
    def _npu_needs_int8(self) -> ExportTfliteSpec:
        if self.npu is not None and self.precision != "int8":
            raise FieldError(
                "npu", f"npu: {self.npu} runs full int8 only; write precision: int8 instead of {self.precision}"
            )
        if self.npu is not None and self.generation:
            raise FieldError("generation", f"npu: {self.npu} compiles one graph; leave generation out, or export twice")
        if self.npu is None and (self.npu_system_config or self.npu_memory_mode):
            raise ValueError(
                "npu_system_config and npu_memory_mode need a target; write for example npu: ethos-u85-256"
            )
        return self


class ExportOnnxSpec(StepSpec):
    """Write the model as ONNX for ONNX Runtime on a CPU; batch and length are free. A classifier takes ids and mask and
    gives logits; a decoder takes a KV cache too and gives the new one, so that one graph scores and writes; a
    translation model and Whisper are an encoder and a decoder that share one file of weights; a CTC model takes
    samples. ``int8-dynamic`` stores products and embeddings as int8, one scale a row, and quantizes activations as they
    come."""

    makes: ClassVar[tuple[Kind, ...]] = ("export",)

    uses: Literal["export_onnx"]
    precision: Literal["float32", "int8-dynamic"] = Field(
        default="float32", description="weights of the file; int8-dynamic keeps float activations between products"
    )
    reduce_range: bool | None = Field(
        default=None,
        examples=["false"],
        description="int8-dynamic: whether the weights of products have 7 bits instead of 8: an x86 CPU without VNNI "
        "adds products of 8 bits in 16 and overflows; one with VNNI, or an ARM CPU, is more exact with 8; default: "
        "true, which is right on every CPU",
    )

    @property
    def reduces(self) -> bool:
        """Whether products have weights of 7 bits."""
        return self.reduce_range is not False

    def gives(self, taken: tuple[Kind, ...]) -> Kind:
        return "export"

    def estimate(self, model: int) -> tuple[int, int]:
        return model // (4 if self.precision == "int8-dynamic" else 1), 5 * model + 2 * RUNTIME_BYTES

    @model_validator(mode="after")
    def _range_needs_int8(self) -> ExportOnnxSpec:
        if self.reduce_range is not None and self.precision != "int8-dynamic":
            raise FieldError(
                "reduce_range",
                f"precision {self.precision} has no range; leave it out or write precision: int8-dynamic",
            )
        return self
