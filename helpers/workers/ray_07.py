"""Ray Serve LLM with its replicas, for lesson 07: `python ray_07.py JOB.json PORT`. It serves, on
loopback and for whoever shows the key in VLLM_API_KEY, until it is ended.
"""

import json
import os
import secrets
import sys
from pathlib import Path

import ray
from ray import serve
from ray.serve.llm import LLMConfig, build_openai_app
from starlette.middleware import Middleware


class Key:
    """Lets only requests through that carry the key: Ray Serve's proxy has none of its own."""

    def __init__(self, app):
        self.app = app
        self.expected = f"Bearer {os.environ['VLLM_API_KEY']}".encode()

    async def __call__(self, scope, receive, send):
        shown = dict(scope.get("headers", [])).get(b"authorization", b"")
        if scope["type"] != "http" or secrets.compare_digest(shown, self.expected):
            await self.app(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 401, "headers": []})
        await send({"type": "http.response.body", "body": b"another key is needed"})


def middlewares() -> list[Middleware]:
    """What Ray Serve's proxy puts before every request: RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH
    names this function.
    """
    return [Middleware(Key)]


def deploy(job: dict, port: int) -> None:
    """A cluster of this machine, an HTTP server on loopback, and behind it copies of vLLM."""
    ray.init(num_cpus=job["cores"], include_dashboard=False, log_to_driver=False)
    engine = {
        "dtype": job["dtype"],
        "max_model_len": 256,
        "enforce_eager": job["device"] == "cpu",
        "distributed_executor_backend": "mp",
    }
    placement = {}
    if job["device"] == "cpu":
        bundles = {"bundles": [{"CPU": 1}]}
        placement = {"accelerator_type": None, "placement_group_config": bundles}
    config = LLMConfig(
        model_loading_config={"model_id": "lesson", "model_source": job["path"]},
        engine_kwargs=engine,
        deployment_config={"num_replicas": job["replicas"]},
        log_engine_metrics=False,
        **placement,
    )
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(build_openai_app({"llm_configs": [config]}), blocking=True)


if __name__ == "__main__":
    deploy(json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2]))
