"""A thousand registered silos, a hundred a round, on one base: peak memory and the engine's own time.

The baseline is what training alone takes: the engine's time is the round's less the time inside the
clients' work, and the memory allowed is the base's, a hundred adapters' and 300 MB.
"""

from __future__ import annotations

import resource
import sys
import time

from benchmarks.common import keep, llama, texts, with_lora
from fedllm.core.aggregate import mean
from fedllm.core.round import averaging
from fedllm.core.seeds import derive
from fedllm.core.types import Reply, Request, Silo, Tensors
from fedllm.exchange.lora_error import lora_error
from fedllm.exchange.select import fixed_size
from fedllm.runtime.local import local
from fedllm.runtime.meter import Traffic, metered
from fedllm.silo.objective import causal_loss
from fedllm.silo.training import local_training

SILOS, A_ROUND, ROUNDS, VOCAB = 1000, 100, 3, 4096


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 1024**2)


def main() -> None:
    model, params = with_lora(llama(8, 512, VOCAB))
    names = [f"silo_{i:04d}" for i in range(SILOS)]
    base = peak_mb()
    adapter = sum(value.numel() * value.element_size() for value in params.values()) / 2**20
    work = local_training(causal_loss(), 0, steps=2, batch_size=2)
    inside = 0.0

    def timed(request: Request, silo: Silo) -> tuple[Reply, Tensors]:
        nonlocal inside
        begun = time.perf_counter()
        answer = work.client(request, silo)
        inside += time.perf_counter() - begun
        return answer

    algorithm = averaging(
        work=work._replace(client=timed),
        select=fixed_size(names, A_ROUND),
        aggregate=mean(),
        probes=[lora_error()],
    )
    data = {name: texts(4, 32, VOCAB, name) for name in names}
    exchange = local(algorithm.client, lambda name: Silo(name, model, data[name], {}, derive(0, name)), {})
    state, begun, traffic = algorithm.init(params), time.perf_counter(), Traffic()
    for _ in range(ROUNDS):
        state, report = algorithm.server(state, metered(exchange, traffic))
    engine = (time.perf_counter() - begun - inside) / (ROUNDS * A_ROUND) * 1000
    peak, allowed = peak_mb(), base + A_ROUND * adapter + 300
    print(f"{SILOS} silos, {A_ROUND} a round, {ROUNDS} rounds, {report['clients']} answered in the last")
    print(f"peak {peak:.0f} MB; allowed {allowed:.0f} MB = base {base:.0f} + 100 x {adapter:.2f} + 300")
    print(f"engine {engine:.2f} ms a client beside {inside / (ROUNDS * A_ROUND) * 1000:.0f} ms of training")
    keep(
        "scale",
        {
            "peak_mb": round(peak),
            "base_mb": round(base),
            "adapter_mb": round(adapter, 2),
            "allowed_mb": round(allowed),
            "engine_ms_per_client": round(engine, 2),
        },
    )


if __name__ == "__main__":
    main()
