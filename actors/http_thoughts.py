"""What an engine has to know of a model's thoughts to answer a conversation."""

from __future__ import annotations

import dataclasses

from understudy.protocol.openai.chat import ChatCompletion
from understudy.protocol.openai.sampling import Generation, ModelTraits
from understudy.runtime.parsers.thinking import thinking_of
from understudy.runtime.tokenizer import Tokenizer


def with_thinking(
    generation: Generation,
    body: ChatCompletion,
    model: ModelTraits,
    tokenizer: Tokenizer,
    *,
    begins_in_reasoning: bool,
) -> Generation:
    """What a body asks for, with what the engine must know of thoughts, if it must.

    Without a budget, it must where a form that the answer should have comes behind them; the
    grammar of calls has room for thoughts itself.

    Raises:
        InvalidRequest: the model has no tokens that close its thoughts.
    """
    is_forced = body.tool_use is not None and body.tool_use.is_forced
    has_form = body.generation.grammar is not None and not is_forced
    if not model.reasoning_parser or (body.thinking_budget is None and not has_form):
        return generation
    thinking = thinking_of(
        model.reasoning_parser,
        tokenizer,
        is_open=begins_in_reasoning,
        budget=body.thinking_budget,
        has_grammar=bool(generation.sampling.grammar),
        vocab_size=model.vocab_size,
    )
    sampling = dataclasses.replace(generation.sampling, thinking=thinking)
    return dataclasses.replace(generation, sampling=sampling)
