"""One process without a cluster: the service asks Ray for nothing there, for asking starts one."""

import subprocess
import sys

IDLE_RAY = """
import asyncio
import ray
from fastapi import FastAPI
from serve_apps.access import guard
from serve_apps.config_files import load_serve_config
from serve_apps.metrics_page import MetricsPage

guard(FastAPI(), load_serve_config("embedded"))
assert asyncio.run(MetricsPage().text()).strip() == ""
assert not ray.is_initialized()
"""


def test_an_idle_ray_is_left_idle() -> None:
    done = subprocess.run([sys.executable, "-c", IDLE_RAY], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
