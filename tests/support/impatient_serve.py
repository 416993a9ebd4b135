"""Run `mirror serve` with a watchdog that waits a short time: python -m tests.support.impatient_serve BUNDLE."""

import sys
from pathlib import Path

from mirror_runtime.triton import ServiceOptions, ServingOptions, serve
from mirror_runtime.triton.server.health import HealthPolicy

serve(
    Path(sys.argv[1]),
    http_port=0,
    grpc_port=0,
    metrics_port=0,
    options=ServingOptions(engine="fake"),
    service=ServiceOptions(health=HealthPolicy(probe_s=0.2, silent_s=1.5)),
    on_ready=lambda server: print(f"gRPC     127.0.0.1:{server.grpc_port}\nmetrics", flush=True),  # noqa: T201
    on_progress=lambda line: print(line, flush=True),  # noqa: T201
)
