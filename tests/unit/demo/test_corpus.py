"""What of a Python installation becomes training text, and which conversations it holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from understudy.tools.demo.corpus import Corpus, SourceFile, lessons, read_corpus


def names(corpus: Corpus) -> list[str]:
    return [file.name for file in (*corpus.training, *corpus.held_out)]


def test_tests_foreign_packages_and_unreadable_sources_are_left_out(sources: Path) -> None:
    assert sorted(names(read_corpus(sources))) == ["a.py", "package/b.py"]


def test_a_folder_without_sources_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no Python sources"):
        read_corpus(tmp_path)


def test_the_digest_tells_corpora_apart(corpus: Corpus, sources: Path) -> None:
    assert read_corpus(sources).digest() == read_corpus(sources).digest()
    assert read_corpus(sources).digest() != corpus.digest()


def test_about_one_file_in_twenty_five_is_held_out_whatever_its_text() -> None:
    files = [SourceFile(f"{number}.py", "") for number in range(2000)]
    share = sum(file.held_out for file in files) / len(files)
    assert 0.03 <= share <= 0.05
    assert files[7].held_out == SourceFile("7.py", "other text").held_out


def test_this_installation_has_enough_to_train_on_and_to_measure_on() -> None:
    corpus = read_corpus()
    assert sum(len(file.text) for file in corpus.training) > 5_000_000
    assert 0.02 < len(corpus.held_out) / len(names(corpus)) < 0.06
    assert not set(corpus.training) & set(corpus.held_out)


def test_lessons_ask_in_turn_and_answer_with_documented_code(corpus: Corpus) -> None:
    conversations = [turns for file in corpus.training for turns in lessons(file)]
    assert len(conversations) > len(corpus.training)
    for turns in conversations:
        roles = [turn.role for turn in turns if turn.role != "system"]
        assert roles in (["user", "assistant"], ["user", "assistant"] * 2)
        for turn in turns:
            if turn.role == "assistant":
                assert turn.content.startswith(("def ", "class "))
                assert '"""' in turn.content


def test_lessons_skip_what_is_private_undocumented_or_broken() -> None:
    text = "def _hidden():\n    '''Return nothing that anybody needs.'''\n    return None\n"
    assert list(lessons(SourceFile("a.py", text))) == []
    assert list(lessons(SourceFile("b.py", "def plain(a, b):\n    return a + b\n" * 9))) == []
    assert list(lessons(SourceFile("c.py", "print 'an older Python'\n"))) == []
