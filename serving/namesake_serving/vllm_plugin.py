"""Plugins of vLLM: other weights into the running engine (group ``vllm.endpoint_plugins``), adapters on a CPU
(``vllm.general_plugins``).

Loaded only where ``VLLM_PLUGINS`` names them. The route is on the private socket that only the gateway reaches:
``POST /namesake/weights {"path": …}`` lets running answers finish, reloads from the folder, forgets every cached prefix
of the old weights, and goes on. The caller has checked the folder: a wrong one would end the engine.
"""

from __future__ import annotations

import time
from typing import Any

NAME = "namesake"
ROUTE = "/namesake/weights"


class Plugin:
    """vLLM's ``EndpointPlugin`` protocol (``vllm/plugins/endpoint_plugins/interface.py``)."""

    name = NAME
    required_tasks = ("generate",)

    def attach_router(self, app: Any) -> None:
        """Add the route."""
        from starlette.responses import JSONResponse

        async def weights(request: Any) -> JSONResponse:
            path = (await request.json())["path"]
            engine, begun = request.app.state.namesake_engine, time.monotonic()
            await engine.pause_generation(mode="wait", clear_cache=True)
            try:
                await engine.collective_rpc("reload_weights", kwargs={"weights_path": path})
                await engine.reset_prefix_cache()
            finally:
                await engine.resume_generation()
            return JSONResponse({"seconds": time.monotonic() - begun})

        app.add_route(ROUTE, weights, methods=["POST"])

    async def init_state(self, engine_client: Any, state: Any, _args: Any) -> None:
        """Keep the engine where the route finds it."""
        state.namesake_engine = engine_client


def better_adapters() -> None:
    """Have a CPU's LoRA computed by :mod:`namesake_serving.vllm_lora`. vLLM calls it in each of its processes."""
    from vllm.platforms import current_platform

    kind: Any = type(current_platform)
    if current_platform.is_cpu():
        kind.get_punica_wrapper = classmethod(lambda _: "namesake_serving.vllm_lora.GroupedLora")
