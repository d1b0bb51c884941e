"""The decode step over slots: captured once as a CUDA graph, and replayed; called as it is elsewhere."""

import torch
from torch import Tensor

from alpaca_core.engines.llama import Llama
from alpaca_core.engines.memory import Memory


class Stepper:
    """Runs `Llama.step` on tensors that stay where they are.

    A graph is made for row lengths up to 256, 512, 1,024 tokens and so on, when rows first need it, and anew
    when the cache has moved.

    Args:
        llama: The weights.
        memory: The cache.
        tokens: Of each slot, and one spare at the end; so are the other tensors.
        lengths: Likewise.
        table: Likewise.
        adapters: Likewise.
    """

    def __init__(
        self, llama: Llama, memory: Memory, tokens: Tensor, lengths: Tensor, table: Tensor, adapters: Tensor
    ) -> None:
        self._llama, self._memory = llama, memory
        self._slots = tokens, lengths, table, adapters
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._version = -1

    def __call__(self, lanes: Tensor | None, longest: int) -> Tensor:
        """Read each slot's token; None are all slots, else `lanes` are some of them.

        Returns:
            Float32 logits, ``(slots, vocab)`` or ``(len(lanes), vocab)``; overwritten by the next call.
        """
        if lanes is not None:
            tokens, lengths, table, adapters = (state[lanes] for state in self._slots)
            return self._llama.step(tokens, lengths, table, adapters, self._memory.cache, longest)
        if self._version != self._memory.version:
            self._graphs.clear()
            self._version = self._memory.version
        if self._slots[0].device.type != "cuda":
            return self._run(longest)
        size = max(256, 1 << (longest - 1).bit_length())
        if size not in self._graphs:
            self._graphs[size] = self._captured(size)
        graph, logits = self._graphs[size]
        graph.replay()
        return logits

    def close(self) -> None:
        """Let go of the graphs, and of what they hold."""
        self._graphs.clear()

    def _run(self, longest: int) -> Tensor:
        tokens, lengths, table, adapters = (state[:-1] for state in self._slots)
        return self._llama.step(tokens, lengths, table, adapters, self._memory.cache, longest)

    def _captured(self, size: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Capture the step, after two on a side stream that compile what is to be compiled.

        They write what the captured step will write, so they do no harm.
        """
        stream, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(stream)
        with torch.cuda.stream(side):
            for _ in range(2):
                self._run(size)
        stream.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=side):
                logits = self._run(size)
        except BaseException:
            torch.cuda.set_stream(stream)  # a capture that cannot even end leaves its own
            raise
        return graph, logits
