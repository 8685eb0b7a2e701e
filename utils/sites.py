"""Where an intervention may act inside the model: the inputs of the decoder's layers, by hooks that a context takes away.

Site `slot` replaces what every decoder layer reads at a latent position (the residual stream, [hidden] a layer), so that the
position's keys and values are those of a donor. Layer inputs, not cached keys: a key is kept rotated by its position and is
wrong at any other.
"""
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


@contextmanager
def layer_inputs(model: torch.nn.Module, put: dict[int, Sequence[torch.Tensor | None]] | None = None,
                 seen: list[torch.Tensor] | None = None) -> Iterator[None]:
    """During one-token steps, put [layers, hidden] in place of the layer inputs of some rows, and note all rows' inputs.

    `put[row][n]` goes into decoder layer n at the last position of `row`, None leaves what is there; `seen` receives
    [B, hidden] a layer, in order, as the layers read them (after replacement).
    """
    layers = model.model.language_model.layers
    for row, states in (put or {}).items():
        if len(states) != len(layers):
            raise ValueError(f"row {row}: states for {len(states)} layers, expected {len(layers)}")

    def read(n: int):
        def hook(module, args, kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            if put:
                hidden = hidden.clone()
                for row, states in put.items():
                    if states[n] is not None:
                        hidden[row, -1] = states[n].to(hidden)
            if seen is not None:
                seen.append(hidden[:, -1])
            return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})
        return hook

    needed = put or seen is not None
    handles = [layer.register_forward_pre_hook(read(n), with_kwargs=True) for n, layer in enumerate(layers)] if needed else []
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
