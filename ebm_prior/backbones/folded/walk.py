r"""The map T of a frozen NVAE as one differentiable function, without autograd inside.

The top-down walk down to the last layer's mean and deviation and nothing after it:

.. math::
    z_i = \mu_i + \sigma_i u_i, \quad \mu_i = 5 \tanh(m_i / 5), \quad
    \sigma_i = e^{5 \tanh(l_i / 5)} + 0.01, \quad (m_i, l_i) = W_i\,\text{ELU}(h_i)

with h_{i+1} = cells_i(A_i h_i + B_i z_i + b_i), the combiner's convolution of both taken apart
(contract, 02-autoencoder and 03-distributions). u, z, mu and sigma are in the precision of u, the
states h in the tower's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ebm_prior.backbones.folded.folding import Kernel, cell_stage
from ebm_prior.backbones.folded.stages import Chain, Elu, Pointwise, Stage, Tape
from ebm_prior.latents import Layout
from ebm_prior.steps import Steps
from nvae.cells import Cell, DecoderCombiner
from nvae.model import AutoEncoder

aten = torch.ops.aten
FLOOR = 0.01  # of sigma
CLAMP = 5.0  # soft clamp of mean and log sigma: 5 tanh(./5)
TOP_STD = 1.0 + FLOOR  # the top layer's mean and log sigma are zero


@dataclass(frozen=True, eq=False)
class Layer:
    """How z_i, i >= 1, follows from z_{i-1} and the state before that is added."""

    add_z: Tensor  # B_{i-1}, (C, c): what z_{i-1} adds to the state
    keep_h: Pointwise | None  # A_{i-1} and b_{i-1}; None: the state is the learned start
    cells: Chain
    moments: Pointwise  # W_i / 5, so that its output is what tanh takes
    slope: Tensor  # W_i: the 1/5 and the 5 of the clamp cancel in the gradient


class Walk:
    """The frozen copy of a model's top-down walk.

    Args:
        model: in eval mode; its weights are copied.
        steps: see `Steps`.
    """

    def __init__(self, model: AutoEncoder, steps: Steps) -> None:
        self.layout = Layout(tuple(model.latent_shapes))
        weight = model.prior_ftr0.detach()
        self.dtype = torch.bfloat16 if steps.precision == "bf16" else weight.dtype
        self.start: Tensor | None = None  # the state behind the first combiner, but for z_0
        self.layers: list[Layer] = []
        self.elu = Elu()
        if not model.config.vanilla:
            self._read(model, steps)

    def _read(self, model: AutoEncoder, steps: Steps) -> None:
        """The tower up to the last latent; what follows is not needed."""
        start = model.prior_ftr0.detach().double().permute(1, 2, 0)  # (H, W, C), learned
        samplers = [Kernel.of(sampler[1]) for sampler in model.dec_sampler]  # type: ignore[index]
        add_z: Tensor | None = None
        keep_h: Pointwise | None = None
        cells: list[Stage] = []
        for module in model.dec_tower:
            if isinstance(module, Cell):
                cells.append(cell_stage(module, steps, self.dtype))
                continue
            if add_z is not None:
                moments = samplers[len(self.layers)]
                self.layers.append(Layer(add_z, keep_h, Chain(cells), *self._moments(moments)))
                cells = []
            if len(self.layers) == len(samplers):
                return
            assert isinstance(module, DecoderCombiner)
            kernel = Kernel.of(module.conv)
            of_h, of_z = kernel.weight[..., 0, 0].split([len(kernel.bias), self._channels], dim=1)
            if add_z is None:
                self.start = self._cast(start @ of_h.T + kernel.bias)
            else:
                keep_h = Pointwise(self._cast(of_h), self._cast(kernel.bias))
            add_z = self._cast(of_z)

    @property
    def _channels(self) -> int:
        """c, of every layer's z."""
        return self.layout.shapes[0][0]

    def _moments(self, kernel: Kernel) -> tuple[Pointwise, Tensor]:
        """W_i / 5 with its bias, and W_i."""
        weight = kernel.weight[..., 0, 0]
        scaled = Pointwise(self._cast(weight / CLAMP), self._cast(kernel.bias / CLAMP))
        return scaled, self._cast(weight)

    def _cast(self, x: Tensor) -> Tensor:
        return x.to(self.dtype).contiguous()

    def __call__(self, u: Tensor) -> Tensor:
        """T(u), (B, D) -> (B, D): z with its layers flattened and joined; differentiable once."""
        return _Map.apply(u, self, torch.is_grad_enabled())

    @torch.no_grad()
    def kept(self, u: Tensor) -> int:
        """Bytes that a forward pass at u, (B, D), keeps for the backward one."""
        tape = Tape()
        self.forward(u, tape)
        return tape.size

    def forward(self, u: Tensor, tape: Tape) -> Tensor:
        """z, (B, D), and on the tape what `backward` needs."""
        z = torch.empty_like(u)
        u_parts, z_parts = self._layers_of(u), self._layers_of(z)
        z_i = u_parts[0] * TOP_STD
        z_parts[0].copy_(z_i)
        h = self.start
        for i, layer in enumerate(self.layers, start=1):
            assert h is not None
            h = h if layer.keep_h is None else layer.keep_h.forward(h, tape)
            h = layer.cells.forward(h + z_i.to(self.dtype) @ layer.add_z.T, tape)
            raw = layer.moments.forward(self.elu.forward(h, tape), tape)
            clamped = raw.to(u.dtype).tanh_()
            mean, log_std = clamped.chunk(2, dim=3)
            spread = log_std.mul(CLAMP).exp_()  # sigma without its floor
            # Channels last as well: the one transposed copy of a layer's u is kept for the way
            # back, and z is transposed once, where it is written.
            u_i = u_parts[i].contiguous()
            tape.put(clamped, spread, u_i)
            z_i = ((spread + FLOOR) * u_i).add_(mean, alpha=CLAMP)
            z_parts[i].copy_(z_i)
        return z

    def backward(self, dz: Tensor, tape: Tape) -> Tensor:
        """The gradient with respect to u of what has the gradient dz, (B, D), at z."""
        du = torch.empty_like(dz)
        dz_parts, du_parts = self._layers_of(dz), self._layers_of(du)
        later: Tensor | None = None  # gradient of the state that z_i has been added to
        dh: Tensor | None = None  # gradient of the state before it, by way of the layers below
        add_z = None
        for i, layer in reversed(list(enumerate(self.layers, start=1))):
            u_i, spread, clamped = tape.take(), tape.take(), tape.take()
            dz_i = _total(dz_parts[i], later, add_z)
            du_parts[i].copy_(dz_i * (spread + FLOOR))
            dclamped = torch.cat([dz_i, spread.mul_(u_i).mul_(dz_i)], dim=3)
            dclamped = aten.tanh_backward(dclamped, clamped, grad_input=dclamped)
            own = self.elu.backward(dclamped.to(self.dtype) @ layer.slope, tape)
            later = layer.cells.backward(own if dh is None else own.add_(dh), tape)
            add_z = layer.add_z
            dh = None if layer.keep_h is None else layer.keep_h.backward(later, tape)
        du_parts[0].copy_(_total(dz_parts[0], later, add_z) * TOP_STD)
        return du

    def _layers_of(self, u: Tensor) -> list[Tensor]:
        """Views (B, H, W, c) of the layers of u."""
        return [part.permute(0, 2, 3, 1) for part in self.layout.split(u)]


def _total(dz: Tensor, later: Tensor | None, add_z: Tensor | None) -> Tensor:
    """The gradient at z_i: of its energy, and by way of the state it is added to."""
    if later is None or add_z is None:
        return dz.contiguous()
    return (later @ add_z).to(dz.dtype).add_(dz)


class _Map(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, walk: Walk, learning: bool) -> Tensor:
        ctx.walk, ctx.tape = walk, Tape(keep=learning and ctx.needs_input_grad[0])
        return walk.forward(u, ctx.tape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor, None, None]:
        tape, ctx.tape = ctx.tape, None
        if tape is None:
            raise RuntimeError(
                "a second backward pass through one T(u) on a frozen copy, whose tape is used up;"
                " call to_z again, or use the plain backbone"
            )
        return ctx.walk.backward(dz, tape), None, None
