"""State that passes from one reply to the next, and that replies which run at once share.

Owns the controller's state between replies, and the policies with what they have measured. It does not decide.
"""

from __future__ import annotations

from balcony_edge.bundle.manifest import Manifest
from balcony_edge.control.company.seen import LearnedAlone
from balcony_edge.control.controller import ControllerState
from balcony_edge.control.governor import Governor
from balcony_edge.control.slowdown import Slowdown
from balcony_runtime.decoding.confident import Confident
from balcony_runtime.decoding.speculate import Speculator


class Learned:
    """State that is kept from reply to reply: the controller's state, our busy time on the device, and the policies.

    Replies that run at once share this object. Each reply starts from the latest state, and all of them count as our own load.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.state = ControllerState.initial()
        self._of_round: ControllerState | None = None  # state after the last round
        self.busy_ns = 0
        self.speculator = Speculator(manifest.exit_layers, manifest.agreement)
        self.confident = Confident(manifest.exit_layers, manifest.confidence)

    def follow(self, slowdown: Slowdown, governor: Governor) -> None:
        """Take over the slowdown and the governor of a round."""
        self.state = self._of_round = self.state._replace(
            governor=governor, slowdown=self.state.slowdown.moved(slowdown)
        )

    def alone(self) -> LearnedAlone | None:
        """Slowdown and governor after replies that ran alone; None if the state has not changed since the last round."""
        state = self.state
        return None if state is self._of_round else LearnedAlone(state.slowdown, state.governor)
