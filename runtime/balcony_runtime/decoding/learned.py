"""What replies teach the next ones about the device; replies that run at once share it.

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
    """What is kept from reply to reply: the controller's state, our busy time on the device, and the policies.

    Replies that run at once share this object. Each reply starts from the latest state, and all of them count as our own load.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.state = ControllerState.initial()
        self._of_round: ControllerState | None = None  # what the last round has left
        self.busy_ns = 0
        self.speculator = Speculator(manifest.exit_layers, manifest.agreement)
        self.confident = Confident(manifest.exit_layers, manifest.confidence)

    def follow(self, slowdown: Slowdown, governor: Governor) -> None:
        """Take over what a round has learned."""
        self.state = self._of_round = self.state._replace(
            governor=governor, slowdown=self.state.slowdown.moved(slowdown)
        )

    def alone(self) -> LearnedAlone | None:
        """What replies that were alone have learned since the last round; None if there were none."""
        state = self.state
        return None if state is self._of_round else LearnedAlone(state.slowdown, state.governor)
