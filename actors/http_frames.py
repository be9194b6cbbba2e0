"""Letting go of what a failed call was, without a collector."""

from __future__ import annotations


def forget_frames(error: BaseException) -> None:
    """Let go of the frames that an error came through, when it has been answered.

    They know the call, which may know the error: only a collector would free that circle, and under
    overload there are hundreds a second.
    """
    seen: set[int] = set()
    links: list[BaseException | None] = [error]
    while links:
        link = links.pop()
        if link is not None and id(link) not in seen:
            seen.add(id(link))
            link.__traceback__ = None
            links += (link.__context__, link.__cause__)
