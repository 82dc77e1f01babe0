"""One part of the Explorer (layer 6): what it shows, and what it does when asked.

The Explorer is a page of images and parts around it: the query bar, the zoomed image, and the
panels, of which one at a time is docked above the page. A part has a name; under that name it has
a trait with what it shows (small plain values, never image bytes) and a component
``vue/NAME.vue``, which sends it actions: ``cbw.act("NAME", "action", {...})`` calls `on_action`.

Everything of a part runs on the Explorer's `ui` lane, except what it gives to `Host.work`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from clipbranches_widget.errors import QueryError

if TYPE_CHECKING:
    from clipbranches_widget.explorer_view import Contents, Place
    from clipbranches_widget.session import Session

Progress = Callable[[str, float], None]


class Host(Protocol):
    """What a part may ask of the Explorer it belongs to."""

    session: Session

    @property
    def contents(self) -> Contents:
        """The latest reading of the session."""

    @property
    def place(self) -> Place:
        """The tab and page shown."""

    def show(self, place: Place) -> None:
        """Show another tab or page."""

    def refresh(self, tab: str | None = None) -> None:
        """Read the session anew, let parts adjust it, and show the place, or another tab."""

    def update(self, *parts: Part) -> None:
        """Show the present state of some parts; without any, of all."""

    def say(self, text: str, kind: str = "info") -> None:
        """Show a remark; of kind "error", an alert that stays until it is dismissed."""

    def work(
        self, name: str, stage: str, job: Callable[[Progress, Callable[[], bool]], None]
    ) -> None:
        """Run a slow job off the ui lane, with a progress bar and a Cancel button.

        The job gets a function that shows a stage and the fraction done, and one that says
        whether it was cancelled or outdated. Whatever it shows, it hands to `post`.
        """

    def aside(self, job: Callable[[Callable[[], bool]], None]) -> None:
        """Run a quick reading job beside everything else; of several waiting, only the latest.

        It gets a function that says whether a later one has come.
        """

    def refine(self, *, threshold: float | None = None) -> None:
        """Run a round on the present labels; without a threshold, at that of the latest one."""

    def post(self, action: Callable[..., None], *args: Any) -> None:
        """Run `action` on the ui lane, after what is waiting there."""

    def message(self, method: str, *args: Any, buffers: Iterable[bytes] = ()) -> None:
        """Call ``jupyter_METHOD(...args, buffers)`` of the root component: bulk, no state."""


class Part:
    """A part of the Explorer.

    Parameters
    ----------
    host : Host
        The Explorer.
    """

    name: ClassVar[str]
    is_docked: ClassVar[bool] = True
    """Whether it is a panel, shown only while it is open."""

    def __init__(self, host: Host) -> None:
        self.host = host

    def state(self) -> dict[str, Any]:
        """Return what it shows; asked for after every change of the session while it is shown."""
        return {}

    def adjust(self, contents: Contents) -> Contents:
        """Return what the pages show instead of `contents`: a part of it, or more tabs.

        The Explorer asks every part, open or not, in the order of its list, after each reading
        of the session and whenever a part calls `Host.refresh`.
        """
        return contents

    def rows(self) -> list[int]:
        """Return the rows that `state` shows, whose labels the browser needs."""
        return []

    def opened(self) -> None:
        """Get ready: the panel was just opened."""

    def closed(self) -> None:
        """Let go: the panel was just closed."""

    def handle(self, action: str, data: dict[str, Any]) -> None:
        """Do what the component asked for."""
        method = getattr(self, f"on_{action}", None)
        if method is None:
            raise QueryError(
                f"expected an action of {self.name!r}, got {action!r}: reload the page, it is of "
                "another release than the kernel"
            )
        method(data)
