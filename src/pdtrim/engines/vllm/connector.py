"""The connector: vLLM's NIXL pull, between two models of different depth and different caches.

Decode reads the pages of the layers that it runs, from the slots that prefill gave them, without
the pages that the plan drops; of a plan with codecs it reads one coded range instead. Leases,
heartbeats, aborts and failures are vLLM's own. A partner of another plan, version or type is
refused at the handshake, whose digest says in words what each is.
"""

from __future__ import annotations

from typing import Any

from pdtrim.engines.pages import is_coded
from pdtrim.engines.vllm import compat
from pdtrim.engines.vllm.coded import Told
from pdtrim.engines.vllm.coded_scheduler import CodedScheduler
from pdtrim.engines.vllm.coded_worker import CodedWorker
from pdtrim.engines.vllm.compat import KVConnectorRole, NixlBaseConnector, NixlPullConnector
from pdtrim.engines.vllm.metrics import Metrics, Stats
from pdtrim.engines.vllm.scheduler import Scheduler
from pdtrim.engines.vllm.stage import check_config
from pdtrim.engines.vllm.worker import Worker


class PDTrimConnector(NixlPullConnector):
    """Named in ``--kv-transfer-config``; ``pdtrim serve`` writes it.

    Options, in ``kv_connector_extra_config``: ``local_prefill`` (on decode): ``refuse`` (default)
    or ``count`` prompts that come without a handover. ``staged_prompts`` (of a plan with codecs):
    how many of the longest prompts may be on their way at once, 4 by default.

    Raises:
        PlanError: a setting under which the pair would not run as planned.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        compat.check()
        served = check_config(vllm_config)
        NixlBaseConnector.__init__(self, vllm_config, role, kv_cache_config)
        engine = (vllm_config, self.engine_id, kv_cache_config)
        coded = is_coded(served.plan)
        if role == KVConnectorRole.SCHEDULER:
            scheduler = CodedScheduler if coded else Scheduler
            self.connector_scheduler = scheduler(*engine, served=served)
        else:
            worker = CodedWorker if coded else Worker
            self.connector_worker = worker(*engine, served=served)

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        """Called before each step, when nothing has been written yet to pages that were freed."""
        self.connector_worker.keep_preempted(kv_connector_metadata)

    def wait_for_save(self) -> None:
        """Called behind each forward."""
        super().wait_for_save()
        if isinstance(self.connector_worker, CodedWorker):
            self.connector_worker.encode(self._connector_metadata)

    def build_connector_worker_meta(self) -> Told | None:
        """What the worker has to tell the scheduler of this step."""
        worker = self.connector_worker
        return worker.take_told() if isinstance(worker, CodedWorker) else None

    def get_kv_connector_stats(self) -> Any:
        """What the worker or the scheduler noted since the last call."""
        if self.connector_worker is not None:
            return self.connector_worker.get_kv_connector_stats()
        return self.connector_scheduler.take_stats()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> Any:
        """From what travelled between processes."""
        return Stats() if data is None else Stats(data=data)

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> Any:
        """Counters for ``/metrics``."""
        return Metrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)
