"""The model of a scenario that generates text: a whole transformers model whose MoE blocks are ours."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_eplb.core.evidence import EvidenceWriter, Row
from moe_eplb.core.scenario import Scenario
from moe_eplb.device import Device
from moe_eplb.integrations.transformers import Replaced, load_model, replace_moe_blocks
from moe_eplb.session.balancing import layer_placement_slots
from moe_eplb.session.groups import Groups
from moe_eplb.session.master import Master
from moe_eplb.session.weights import seeded_generator, torch_dtype

__all__ = ["GeneratingModel"]


_CANDIDATES = 16
"""How many tokens the original model's logits are kept of at each position."""
_LEAST_LOGIT = 2.0**-60
"""Smaller logits are no measure for anything."""


class GeneratingModel:
    """Greedy generation on one rank, one token of every sequence an iteration; the first iteration takes the prompts.

    Where it is known what the original model generates, each next token continues that text: after a choice between two
    that are as good as each other, an own text would be another one, and nothing more of it could be compared.

    Must be built inside the balancer's context where there is one.

    Args:
        scenario: What to build.
        rank: This rank, which has its own prompts.
        device: Where it runs.
        groups: Process groups of the ranks.

    Attributes:
        blocks: The blocks that stand where the model had its own.
        masters: For each block, the original model's weights.
    """

    def __init__(self, scenario: Scenario, rank: int, device: Device, groups: Groups) -> None:
        folder = Path(scenario.model.hf or "")
        self._model = load_model(folder, seed=scenario.seed, dtype=torch_dtype(scenario.model.dtype))
        self._model.to(device.torch_device)  # type: ignore[arg-type]  # its stubs take a module there
        self._prompts = self._draw_prompts(scenario, rank).to(device.torch_device)
        self._candidates: list[_Candidates] = []
        self._expected = self._generate_without_us(scenario.iterations) if scenario.checks.generation else None
        replaced = replace_moe_blocks(
            self._model, device, ep_group=groups.model, statistics_group=groups.statistics, num_slots=scenario.slots,
            dispatch=scenario.dispatch, statistics=scenario.statistics_path,
            moe_max_num_tokens=scenario.moe_max_num_tokens,
            initial_slots=[layer_placement_slots(scenario, layer) for layer in range(scenario.model.layers)],
        )  # fmt: skip
        self.blocks = [one.block for one in replaced]
        self.masters = [_on_host(one) for one in replaced]
        self._next = self._prompts
        self._cache: Any = None
        self._generated: list[Tensor] = []

    def prefetch(self, iterations: Iterable[int]) -> None:
        """Nothing is drawn: each iteration goes on from what the one before has said."""

    def load(self, iteration: int) -> Callable[[], Tensor]:
        """See `Model`; the forward gives the next token of every sequence, int64 [B]."""
        return self._step

    def _step(self) -> Tensor:
        output = self._model(input_ids=self._next, past_key_values=self._cache, use_cache=True)
        chosen: Tensor = output.logits[:, -1].argmax(dim=-1)
        said = chosen if self._expected is None else self._expected[:, len(self._generated)]
        self._cache, self._next = output.past_key_values, said.unsqueeze(1)
        self._generated.append(chosen)
        return chosen

    def finish(self, evidence: EvidenceWriter) -> None:
        """Write down what was generated, beside what the original model generates."""
        if self._expected is not None:
            tokens = torch.stack(self._generated, dim=1)
            gaps = [one.gaps(chosen) for one, chosen in zip(self._candidates, self._generated, strict=True)]
            by_sequence = [list(sequence) for sequence in zip(*gaps, strict=True)]
            evidence.write(
                Row.GENERATED, tokens=tokens.tolist(), expected=self._expected.tolist(), gaps=by_sequence
            )  # fmt: skip

    def _draw_prompts(self, scenario: Scenario, rank: int) -> Tensor:
        shape = (scenario.sequences(rank), scenario.workload.prompt_tokens)
        generator = seeded_generator("prompt", scenario.seed, rank)
        return torch.randint(0, self._model.config.vocab_size, shape, generator=generator)

    def _generate_without_us(self, tokens: int) -> Tensor:
        """What transformers' own generation says, with its own blocks; end tokens do not end it."""
        from transformers import GenerationConfig, LogitsProcessorList

        # The model's own one may ask for penalties, and would fill in whatever another one that is given leaves open.
        self._model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
            do_sample=False, num_beams=1
        )  # fmt: skip
        output = self._model.generate(  # type: ignore[operator]  # a mixin that the stubs do not know
            self._prompts, attention_mask=torch.ones_like(self._prompts), max_new_tokens=tokens, eos_token_id=None,
            pad_token_id=0, logits_processor=LogitsProcessorList([self._keep_candidates]),
        )  # fmt: skip
        new: Tensor = output[:, self._prompts.shape[1] :]
        return new

    def _keep_candidates(self, input_ids: Tensor, logits: Tensor) -> Tensor:
        self._candidates.append(_Candidates.of(logits))
        return logits


@dataclass(frozen=True, slots=True)
class _Candidates:
    """The best tokens of each sequence at one position and their logits float32 [B, N]; `largest` of all [B]."""

    tokens: Tensor
    logits: Tensor
    largest: Tensor

    @classmethod
    def of(cls, logits: Tensor) -> _Candidates:
        """From all logits [B, V]."""
        exact = logits.to(torch.float32)
        best = exact.topk(min(_CANDIDATES, exact.shape[1]), dim=1)
        return cls(best.indices, best.values, exact.abs().amax(dim=1))

    def gaps(self, chosen: Tensor) -> list[float | None]:
        """By how much of the largest logit tokens [B] fall short of the best ones; None for one that is not kept."""
        found: list[float | None] = []
        for row, token in enumerate(chosen):
            at = torch.nonzero(self.tokens[row] == token).flatten()
            short = (self.logits[row, 0] - self.logits[row, at]) / self.largest[row].clamp(min=_LEAST_LOGIT)
            found.append(float(short[0]) if len(short) else None)
        return found


def _on_host(replaced: Replaced) -> Master:
    """The original weights where the checks compute."""

    def experts(expert: int) -> dict[str, Tensor]:
        return {name: tensor.cpu() for name, tensor in replaced.weights(expert).items()}

    shared = replaced.shared
    return Master(experts, None if shared is None else {name: tensor.cpu() for name, tensor in shared.items()})
