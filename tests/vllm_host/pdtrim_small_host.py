"""Lets several vLLM servers share two cores; the tests put this folder on their PYTHONPATH.

vLLM's workers spin while they wait for the engine, and each NIXL agent has a thread that polls
without a pause: two idle servers keep two cores busy. Both wait a little here. On CPUs vLLM starts
the processes of a server anew, each with all its imports; here they are forked, as vLLM does it
elsewhere. And what kind of model it serves vLLM finds out in one more process, lest CUDA starts;
here there is none. Nothing else changes.
"""

import os
import time


def register():
    """Called by vLLM in each of its processes."""
    from nixl_cu12 import _api
    from vllm.distributed.device_communicators import shm_broadcast
    from vllm.model_executor.models import registry
    from vllm.platforms.cpu import CpuPlatform

    registry._run_in_subprocess = lambda find_out: find_out()
    shm_broadcast.sched_yield = lambda: time.sleep(0.0005)
    plain = _api.nixlBind.nixlAgentConfig

    class Patient(plain):
        def __setattr__(self, name, value):
            super().__setattr__(name, 500 if name == "pthrDelay" else value)  # microseconds

    if plain.__name__ != "Patient":
        _api.nixlBind.nixlAgentConfig = Patient

    check = CpuPlatform.check_and_update_config

    @classmethod
    def check_and_fork(cls, config):
        check(config)
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"

    CpuPlatform.check_and_update_config = check_and_fork
