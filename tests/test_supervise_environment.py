"""What programs of others find in their environment."""

from __future__ import annotations

import pytest

from stepladder.supervise import child_environment

PASSED = ("PATH", "HOME", "LC_ALL", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH", "NCCL_DEBUG", "OMP_NUM_THREADS",
          "HF_HOME", "PYTHONPATH", "VLLM_CPU_KVCACHE_SPACE", "TOKENIZERS_PARALLELISM", "NODE_RANK")  # fmt: skip
KEPT_BACK = ("OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY", "MY_TEACHER", "HF_TOKEN", "VLLM_API_KEY", "HTTPS_PROXY",
             "OPENAI_ORG_ID", "STEPLADDER_SECRET", "SSH_AUTH_SOCK", "https_proxy")  # fmt: skip


def test_it_holds_what_they_need_and_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PASSED + KEPT_BACK:
        monkeypatch.setenv(name, "x")
    environment = child_environment()
    assert {*PASSED} <= environment.keys()
    assert not {*KEPT_BACK} & environment.keys()
