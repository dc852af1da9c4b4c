"""How many workers a training takes of a cluster that has room for some of them: Ray Train's elastic policy, which knows any
number between the least and the most, held to those that a layout and a batch can be shared among.
"""

from collections.abc import Sequence
from typing import Any

import ray
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy

LOOK_TIMEOUT_S = 30.0


class FittingWorkers(ElasticScalingPolicy):
    """The largest of these numbers that there is room for; with less room than for the least, it waits."""

    def __init__(self, scaling_config: Any, fitting: Sequence[int]) -> None:
        super().__init__(scaling_config)
        self._fitting = tuple(fitting)

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        room = super()._count_possible_workers(reserved_resources)
        return max((count for count in self._fitting if count <= room), default=0)

    def make_decision_for_non_running_worker_group(self) -> Any:
        """Look at the cluster anew: what Ray knows of it may be older than the node that was just lost, and waiting for a
        place on that node takes a minute.
        """
        self._maybe_send_resource_request()  # type: ignore[no-untyped-call]
        room = self._autoscaling_coordinator.get_reserved_resources.remote(self._requester_id, recompute=True)
        ray.get(room, timeout=LOOK_TIMEOUT_S)
        return super().make_decision_for_non_running_worker_group()
