"""A model for CTC (wav2vec2 and its kin): samples of fixed length in, logits for every frame out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks.context import StepError
from tasks.export.attention import additive, padding
from tasks.export.convert import Signature
from tasks.export.names import LOGITS, MASK, SAMPLES, SCORE

if TYPE_CHECKING:
    from torch import Tensor, nn


def ctc(model: Any, batch: int, length: int, lookup: bool, samples: Sequence[np.ndarray] = ()) -> list[Signature]:
    """The only signature: ``input_values`` float and ``attention_mask`` int32, both [batch, length], to ``logits``
    [batch, frames, vocabulary].

    A frame counts where all samples that it is made of do. What is padded changes nothing: it is masked in the
    attention, set to zero before the convolution that stands for positions, and left out of the statistics of a group
    norm, which torch takes over the padding too. Weight norm is folded into the weights.

    Args:
        model: the model; its convolutions are changed.
        batch: recordings of the input.
        length: samples of the input.
        lookup: whether the mask is looked up, for full int8; the channels before a group norm are then brought to about
            one size, which the norm takes out again, since they share one scale in int8.
        samples: recordings from which their size is taken.

    Raises:
        StepError: the model shortens its frames behind the convolutions.
    """
    import torch

    values = torch.zeros(batch, length)
    inputs = {SAMPLES: values, MASK: torch.ones(batch, length, dtype=torch.int32)}
    return [Signature(SCORE, listener(model, lookup, samples), inputs)]


def listener(model: Any, lookup: bool, samples: Sequence[np.ndarray] = (), dense: bool = True) -> nn.Module:
    """The module of the signature; see ``ctc``. With ``dense`` the first convolution is one over several channels.

    Raises:
        StepError: as ``ctc``.
    """
    import torch
    from torch import nn

    base = model.base_model
    if getattr(base, "adapter", None) is not None:
        raise StepError(f"{model.config.model_type} with an adapter behind the encoder cannot be exported")
    layers = list(base.feature_extractor.conv_layers)
    base.encoder.pos_conv_embed = _positions(base.encoder.pos_conv_embed)
    sizes = _even_out(layers, samples) if lookup else {}

    class Ctc(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.bias = additive(lookup)
            self.counts = nn.Embedding.from_pretrained(torch.tensor([[0.0], [1.0]])) if lookup else None

        def forward(self, input_values: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
            hidden = input_values if dense else input_values[:, None, None]
            for number, layer in enumerate(layers):
                first = dense and number == 0
                hidden = _convolve_samples(hidden, layer.conv) if first else _convolve(hidden, layer.conv)
                norm = getattr(layer, "layer_norm", None)
                if isinstance(norm, nn.GroupNorm):
                    counts = _whole_frames(attention_mask, layers[: number + 1], None if dense else hidden.shape[-1])
                    hidden = _norm_of_channels(hidden, self.flags(counts)[:, None, None], norm, sizes.get(number))
                elif norm is not None:
                    hidden = _norm_of_frames(hidden, norm)
                hidden = layer.activation(hidden)
            projected = base.feature_projection(hidden.permute(0, 2, 3, 1)[:, 0])
            hidden = projected[0] if isinstance(projected, tuple) else projected
            mask = _whole_frames(attention_mask, layers, None if dense else hidden.shape[1])
            hidden = hidden * self.flags(mask)[..., None]
            with padding(self.bias(mask)[:, None, None]):
                hidden = base.encoder(hidden).last_hidden_state
            return {LOGITS: self.model.lm_head(hidden)}

        def flags(self, mask: Tensor) -> Tensor:
            return mask.float() if self.counts is None else self.counts(mask).view(mask.shape)

    return Ctc()


def _whole_frames(mask: Tensor, layers: Sequence[Any], frames: int | None) -> Tensor:
    """The mask of the frames that convolutions make of samples: a frame counts where its last sample does. With
    ``frames``, how many they are, the samples are looked up, so that a free length is seen to be that of the frames."""
    import torch

    reach, step = 1, 1
    for layer in layers:
        reach += (layer.conv.kernel_size[0] - 1) * step
        step *= layer.conv.stride[0]
    return mask[:, reach - 1 :: step] if frames is None else mask[:, torch.arange(frames) * step + reach - 1]


def _convolve_samples(samples: Tensor, conv: nn.Conv1d) -> Tensor:
    """The first convolution, over samples [batch, samples], to [batch, channels, 1, frames].

    As many samples as it strides over are taken as the channels of one step, so that it is a dense convolution of
    stride 1: one of a single channel is slow everywhere, and strides further than an Ethos-U55 can.
    """
    import torch

    (kernel,), (stride,) = conv.kernel_size, conv.stride
    frames = (samples.shape[1] - kernel) // stride + 1
    steps = -(-kernel // stride)
    whole = torch.nn.functional.pad(samples, (0, max((frames - 1 + steps) * stride - samples.shape[1], 0)))
    whole = whole[:, : (frames - 1 + steps) * stride].view(len(samples), 1, -1, stride)
    weight = torch.nn.functional.pad(conv.weight[:, 0], (0, steps * stride - kernel))
    weight = weight.view(-1, steps, stride).transpose(1, 2)[:, :, None]
    return torch.nn.functional.conv2d(whole.permute(0, 3, 1, 2), weight, conv.bias)


def _convolve(hidden: Tensor, conv: nn.Conv1d) -> Tensor:
    """A convolution over time, [batch, channels, 1, frames]: of two dimensions, so that the converter keeps the layout
    of the device from one convolution to the next."""
    import torch

    return torch.nn.functional.conv2d(
        hidden, conv.weight[:, :, None], conv.bias, stride=(1, conv.stride[0]), groups=conv.groups
    )


def _even_out(layers: Sequence[Any], samples: Sequence[np.ndarray]) -> dict[int, Tensor]:
    """Divide the channels before each group norm by their root mean square over ``samples``: by layer, [channels]."""
    import torch
    from torch import nn

    sizes: dict[int, Tensor] = {}
    with torch.no_grad():
        hidden = [torch.from_numpy(np.array(one))[None, None] for one in samples]
        for number, layer in enumerate(layers):
            if isinstance(getattr(layer, "layer_norm", None), nn.GroupNorm):
                squares = [layer.conv(one).var(-1).mean(0) for one in hidden]
                sizes[number] = torch.stack(squares).mean(0).sqrt().clamp(min=1e-6)
                layer.conv.weight.div_(sizes[number][:, None, None])
                if layer.conv.bias is not None:
                    layer.conv.bias.div_(sizes[number])
            hidden = [layer(one) for one in hidden]
    return sizes


def _norm_of_channels(hidden: Tensor, flags: Tensor, norm: nn.GroupNorm, sizes: Tensor | None) -> Tensor:
    """The norm of every channel over its frames that count.

    Args:
        hidden: [batch, channels, 1, frames].
        flags: [batch, 1, 1, frames].
        norm: torch's norm.
        sizes: what the channels were divided by, [channels].
    """
    least = norm.eps if sizes is None else (norm.eps / sizes**2)[:, None, None]
    share = flags.mean(-1, keepdim=True)
    centred = (hidden - (hidden * flags).mean(-1, keepdim=True) / share) * flags
    variance = (centred * centred).mean(-1, keepdim=True) / share
    return centred * (variance + least).rsqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]


def _norm_of_frames(hidden: Tensor, norm: nn.LayerNorm) -> Tensor:
    """The norm of every frame over its channels."""
    centred = hidden - hidden.mean(1, keepdim=True)
    variance = (centred * centred).mean(1, keepdim=True)
    scaled = centred * (variance + norm.eps).rsqrt()
    return scaled * norm.weight[:, None, None] + norm.bias[:, None, None] if norm.elementwise_affine else scaled


def _positions(embed: Any) -> nn.Module:
    """The convolution that stands for positions, with its weight norm folded and its padding before it.

    Raises:
        StepError: it is more than one convolution.
    """
    import torch
    from torch import nn

    conv: Any = getattr(embed, "conv", None)
    if not isinstance(conv, nn.Conv1d) or getattr(embed, "batch_norm", None) is not None:
        raise StepError("the model's positions are no single convolution, so that padding would change what it hears")
    kernel = conv.kernel_size[0]
    left = int(conv.padding[0])
    weight = conv.weight.detach()

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(conv.in_channels, conv.out_channels, kernel, groups=conv.groups)
            self.conv.weight.data, self.conv.bias = weight, conv.bias
            self.activation = embed.activation

        def forward(self, hidden: Tensor) -> Tensor:
            padded = torch.nn.functional.pad(hidden, (0, 0, left, kernel - 1 - left))
            return self.activation(_convolve(padded[:, None].permute(0, 3, 1, 2), self.conv)).permute(0, 2, 3, 1)[:, 0]

    return Positions().requires_grad_(False)
