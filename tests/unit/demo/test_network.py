"""The training network is the Llama of `transformers`, weight for weight."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from understudy.tools.demo.checkpoint import read_checkpoint, write_checkpoint
from understudy.tools.demo.network import Network
from understudy.tools.demo.train import Preset
from understudy.tools.demo.vocabulary import train_tokenizer


def random_network(preset: Preset) -> Network:
    """A network in which every weight has an effect, as none has after `Network` made it."""
    generator = torch.Generator().manual_seed(3)
    network = Network(preset.model.shape, generator=generator)
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.3)
    return network


def test_a_written_checkpoint_gives_the_same_logits_in_transformers(
    preset: Preset, tmp_path: Path
) -> None:
    tokenizer = train_tokenizer(["x = 1\n"], vocab_size=preset.vocab_size)
    write_checkpoint(random_network(preset), tokenizer, tmp_path)
    network = read_checkpoint(tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = torch.arange(64).view(2, 32)
    with torch.no_grad():
        torch.testing.assert_close(network(tokens), reference(tokens).logits, rtol=1e-4, atol=1e-4)


def test_a_later_token_changes_nothing_before_it(preset: Preset) -> None:
    network = random_network(preset)
    tokens = torch.arange(32).view(1, 32)
    changed = tokens.clone()
    changed[0, 20] = 99
    with torch.no_grad():
        before, after = network(tokens), network(changed)
    torch.testing.assert_close(before[:, :20], after[:, :20])
    assert not torch.allclose(before[:, 20:], after[:, 20:])


def test_checkpoints_are_readable_for_everyone(preset: Preset, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["x = 1\n"], vocab_size=preset.vocab_size)
    write_checkpoint(random_network(preset), tokenizer, tmp_path)
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in tmp_path.iterdir())
