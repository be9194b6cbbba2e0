"""Pure decisions of the engine: which sequence gets how many tokens in the next step."""
