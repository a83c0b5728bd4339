"""Ray Serve LLM with one replica, for lesson 07: `python replicas.py JOB.json`."""

import json
import sys
import time
import urllib.request
from pathlib import Path

import ray
from ray import serve
from ray.serve.llm import LLMConfig, build_openai_app


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    ray.init(num_cpus=job["cores"], include_dashboard=False, log_to_driver=False)
    engine = {"dtype": "float32", "max_model_len": 256, "enforce_eager": True, "distributed_executor_backend": "mp"}
    config = LLMConfig(model_loading_config={"model_id": "lesson", "model_source": job["model"]}, accelerator_type=None,
                       placement_group_config={"bundles": [{"CPU": 1}]}, engine_kwargs=engine,
                       deployment_config={"num_replicas": 1}, log_engine_metrics=False)
    serve.start(http_options={"host": "127.0.0.1", "port": job["port"]})
    serve.run(build_openai_app({"llm_configs": [config]}))
    body = {"model": "lesson", "prompt": job["prompt"], "max_tokens": job["new_tokens"], "temperature": 0,
            "ignore_eos": True}
    request = urllib.request.Request(f"http://127.0.0.1:{job['port']}/v1/completions", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    taken = []
    for _ in range(job["warmup"] + job["repeats"]):
        start = time.perf_counter()
        answer = json.load(urllib.request.urlopen(request, timeout=120))
        taken.append(time.perf_counter() - start)
    Path(job["folder"], "ray.json").write_text(json.dumps({"taken": taken, "text": answer["choices"][0]["text"]}))
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
