"""Do weights in 4 bits compute what their format says?"""

from __future__ import annotations

import pytest
import torch

from nbhelpers import quantization


@pytest.mark.parametrize("width", [96, 64, 32, 48])
@pytest.mark.parametrize("nested", [True, False])
def test_4_bit_layers_compute_what_their_format_says_whatever_their_width(width, nested):
    """By hand: 16 values, and a scale for each 64 weights, row after row (nested: in 8 bits, and a mean)."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = bitsandbytes.nn.Linear4bit(width, 64, quant_type="nf4", compress_statistics=nested).to("cpu")
    quantization.mend_4bit_on_cpu(layer)
    state = layer.weight.quant_state
    packed = layer.weight.data.flatten()
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten().long()
    scales = state.absmax
    if nested:
        scales = state.state2.code[state.absmax.long()] * state.state2.absmax[0] + state.offset
    by_hand = (state.code[codes].view(-1, 64) * scales[:, None]).view(64, width)
    inputs = torch.randn(3, width, generator=torch.Generator().manual_seed(1), requires_grad=True)
    output = layer(inputs)
    torch.testing.assert_close(output, inputs @ by_hand.T + layer.bias, rtol=1e-5, atol=1e-5)
    output.sum().backward()
    torch.testing.assert_close(inputs.grad, by_hand.sum(0).expand(3, -1), rtol=1e-5, atol=1e-5)
