"""Ray Serve LLM with its replicas, for lesson 07: `python ray_07.py JOB.json`."""

import json
import sys
import time
import urllib.request
from pathlib import Path

import ray
from ray import serve
from ray.serve.llm import LLMConfig, build_openai_app


def deploy(job: dict) -> None:
    """A cluster of this machine, an HTTP server on loopback, and behind it copies of vLLM."""
    ray.init(num_cpus=job["cores"], include_dashboard=False, log_to_driver=False)
    engine = {
        "dtype": "float32",
        "max_model_len": 256,
        "enforce_eager": True,
        "distributed_executor_backend": "mp",
    }
    model = {"model_id": "lesson", "model_source": job["model"]}
    cpu = {"accelerator_type": None, "placement_group_config": {"bundles": [{"CPU": 1}]}}
    config = LLMConfig(
        model_loading_config=model,
        engine_kwargs=engine,
        deployment_config={"num_replicas": 1},
        log_engine_metrics=False,
        **(cpu if job["place"] == "cpu" else {}),
    )
    serve.start(http_options={"host": "127.0.0.1", "port": job["port"]})
    serve.run(build_openai_app({"llm_configs": [config]}))


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    deploy(job)
    body = {
        "model": "lesson",
        "prompt": job["text"],
        "max_tokens": job["new_tokens"],
        "temperature": 0,
        "ignore_eos": True,
    }
    request = urllib.request.Request(
        f"http://127.0.0.1:{job['port']}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback has no proxy
    taken = []
    for _ in range(job["warmup"] + job["repeats"]):
        start = time.perf_counter()
        answer = json.load(direct.open(request, timeout=120))
        taken.append(time.perf_counter() - start)
    found = {"taken": taken, "text": answer["choices"][0]["text"]}
    Path(job["folder"], f"{job['name']}-0.json").write_text(json.dumps(found))
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
