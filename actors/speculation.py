"""How an engine gets its speculator: the drafter that is configured, and what its guesses cost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Final

from understudy.protocol.errors import ConfigurationError
from understudy.runtime.config import EngineConfig
from understudy.runtime.grammar_masks import GrammarMasks
from understudy.runtime.grammars import Grammars
from understudy.runtime.kit.clock import Clock
from understudy.runtime.log import get_logger
from understudy.runtime.model.config import ModelConfig
from understudy.runtime.model.cost_cache import remembered_costs
from understudy.runtime.model.drafter import ModelDrafter
from understudy.runtime.model.loader import load_model
from understudy.runtime.model.model_digest import model_digest
from understudy.runtime.model.runner import ModelRunner
from understudy.runtime.model.step_profile import profile_drafts, profile_steps
from understudy.runtime.model.transformer import Transformer
from understudy.runtime.processor import processor_name
from understudy.runtime.scheduling.prompt_lookup import NgramDrafter
from understudy.runtime.scheduling.speculation import (
    Costs,
    CostTable,
    DraftCosts,
    SlowDrafter,
    Speculator,
    StepCosts,
)
from understudy.runtime.speculative_config import parse_speculative_config

_TABLES: Final = "3"
"""Which tables are measured; another number when others are."""


def load_speculator(
    config: EngineConfig,
    model: Transformer,
    runner: ModelRunner,
    grammars: Grammars,
    clock: Clock,
    *,
    numerics: str,
) -> Speculator | None:
    """Load what the configuration says of speculation, and measure what it costs.

    What stood there before is looked up with any method; a draft model is asked where nothing did.
    It guesses within the requests' grammars; what is beside them would be in vain. What was
    measured for this class of ``numerics`` on such a machine is not measured again.

    Raises:
        ConfigurationError: the draft model is none, or speaks of other tokens than the model.
    """
    if config.speculative_config is None:
        return None
    chosen = parse_speculative_config(config.speculative_config)
    drafter: SlowDrafter | None = None
    measured: list[Callable[[], tuple[CostTable, ...]]] = [lambda: (profile_steps(runner, clock),)]
    name = [_TABLES, numerics, processor_name(), str(config.block_size)]
    if chosen.model is not None:
        _check_same_tokens(config.model, chosen.model)
        draft_runner = _draft_runner(config, chosen.model, model, runner, grammars)
        measured.append(lambda: profile_drafts(draft_runner, clock))
        name.append(model_digest(chosen.model))
        drafter = ModelDrafter(
            draft_runner, num_blocks=runner.cache.num_blocks, block_size=config.block_size
        )
    costs = None
    if chosen.adaptive:
        step, *draft = remembered_costs(
            "\n".join(name), lambda: tuple(table for each in measured for table in each())
        )
        costs = Costs(StepCosts(step), DraftCosts(*draft) if draft else None)
    get_logger().info(
        "speculation is on",
        method=chosen.method,
        depth_max=chosen.num_speculative_tokens,
        adaptive=chosen.adaptive,
    )
    return Speculator(
        NgramDrafter(), drafter=drafter, depth_max=chosen.num_speculative_tokens, costs=costs
    )


def _draft_runner(
    config: EngineConfig,
    directory: Path,
    model: Transformer,
    runner: ModelRunner,
    grammars: Grammars,
) -> ModelRunner:
    # Its guesses are checked, so its numbers need not be exact.
    draft = load_model(directory, dtype=model.dtype, device=model.device, numerics="fast")
    if draft.vocab_size != model.vocab_size:
        raise ConfigurationError(
            f"{directory}: the draft model has {draft.vocab_size} tokens and the model"
            f" {model.vocab_size}; a draft model needs the model's tokenizer"
        )
    return ModelRunner(
        draft,
        num_blocks=runner.cache.num_blocks,
        block_size=config.block_size,
        grammar_masks=GrammarMasks(grammars),
    )


def _check_same_tokens(target: Path, draft: Path) -> None:
    ModelConfig.from_directory(draft)  # a directory that holds no model is told as such
    if _vocabulary(target) != _vocabulary(draft):
        raise ConfigurationError(
            f"{draft}: its tokenizer is not that of {target}; a draft model needs the same"
        )


def _vocabulary(directory: Path) -> object:
    """What decides which ids stand for what."""
    path = directory / "tokenizer.json"
    try:
        fields = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path}: it cannot be read: {error}") from error
    return [fields.get(name) for name in ("model", "added_tokens", "pre_tokenizer", "normalizer")]
