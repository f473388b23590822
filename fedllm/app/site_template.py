"""The `site.toml` that a new site begins with; in a file of its own, so that making one loads no library."""

from __future__ import annotations

TEMPLATE = """\
# This file belongs to the site. Nothing is done here that it does not allow.
name = "{name}"
# threads = 2                       # processor threads of training; those of the recipe, or all, if nothing is said
# processes = 2                     # processes that share the model that is trained here; on GPUs one each

[data]
# train = "my.jsonl"                # a file, a folder, docstrings:PACKAGE or a database's URL;
# test = "my_test.jsonl"            # `fedllm site start --data my.jsonl` says it for one start
# query = "select prompt, response from notes"          # where train is a database's URL
# columns = {{ prompt = "frage", response = "antwort" }}  # the recipe's name of a column = its name here
# A recipe with [duplicates] needs FEDLLM_SALT in the environment: a secret of the sites that the server must not have.
# One with [homomorphic] needs FEDLLM_KEY, made by `openssl rand -hex 32` once for all sites: also not for the server.

[models]
# The base models that recipes may name here; with a path it is loaded from there, with a sha256 nothing else is.
"smollm2-135m-instruct" = {{}}

[policy]
# What is not said sets no limit. `fedllm site check RECIPE` shows what a recipe would do here.
# users = ["admin@example.org"]     # who may start runs
# recipes = ["<sha256>"]            # these recipes only
# trainables = ["lora"]             # tasks, clients, selects, aggregates, optimisers, transforms alike
# rounds_a_run = 100
# rounds_a_day = 50
# tokens_a_day = 5_000_000
# clip = 1.0                        # the largest norm of an update that may leave
# epsilon = 8.0                     # what all runs together may spend of this text, over the life of `state`
# delta = 1e-5                      # at which epsilon is reckoned
# trust_server = false              # whether noise that only the server adds counts
# trust_sites = false               # whether noise counts of which other sites add their parts
# secure_aggregation = true         # only sums with other sites' updates may leave
# metrics = ["train_loss", "loss", "tokens"]
"""
