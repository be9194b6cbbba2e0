"""Who guesses in tests of what no guess may change."""

from __future__ import annotations

from typing import Any

from tests.serving import Service
from understudy.runtime.grammar_masks import GrammarMasks
from understudy.runtime.grammars import Grammars
from understudy.runtime.model.drafter import ModelDrafter
from understudy.runtime.model.runner import ModelRunner
from understudy.runtime.model.transformer import Transformer
from understudy.runtime.scheduling.prompt_lookup import NgramDrafter
from understudy.runtime.scheduling.speculation import Drafter, SlowDrafter, Speculator


class Oracle:
    """Guesses what will come, but for every third guess."""

    def __init__(self, truth: Service) -> None:
        self._truth = truth

    def propose(self, wanted: Any) -> dict[int, list[int]]:
        drafts = {}
        for sequence, depth in wanted:
            made = sequence.num_output_tokens
            draft = self._truth.served[sequence.request_id].tokens[made : made + depth]
            if made % 3 == 0 and draft:
                draft[made % len(draft)] ^= 1
            if draft:
                drafts[sequence.request_id] = draft
        return drafts


def speculator_of(kind: str, truth: Service, draft: Transformer, grammars: Grammars) -> Speculator:
    """A speculator with a lookup, an oracle, or both a lookup and a draft model."""
    lookup: Drafter = Oracle(truth) if kind == "oracle" else NgramDrafter()
    drafter: SlowDrafter | None = None
    if kind == "both":
        runner = ModelRunner(
            draft, num_blocks=256, block_size=8, grammar_masks=GrammarMasks(grammars)
        )
        drafter = ModelDrafter(runner, num_blocks=256, block_size=8)
    return Speculator(lookup, drafter=drafter, depth_max=4, costs=None)
