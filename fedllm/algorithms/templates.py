"""A library of prompt templates that silos add to and vote on, with its version and every silo's score.

In a round each silo scores the library on its own questions, votes for the template that does best there, and may add
some: from a file of its own, or its model's rewriting of the best so far. The server keeps the best by mean score, or,
with an epsilon, counts only the votes, by report noisy max: no scores leave then, and the server's noise hides each
silo's vote from whoever sees the winner. What the server itself sees is not hidden, and added templates are not either.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fedllm.algorithms.asking import asked_of, evaluating, gathered, prompting, require_counts
from fedllm.algorithms.exemplars import read_scores
from fedllm.algorithms.method import Ground, Method, require_no_transforms
from fedllm.algorithms.prompt_files import write_prompt
from fedllm.core.errors import FedllmError, Refused
from fedllm.core.seeds import derive, generator
from fedllm.core.texts import as_tensors, texts_in
from fedllm.core.types import Exchange, Reply, Report, Request, Select, Silo, State, Step, Tensors
from fedllm.exchange.votes import epsilon_of_votes, require_epsilon, winner
from fedllm.silo.asking import Measured, drawn, filled, measure
from fedllm.silo.speaker import Speaker, Writing
from fedllm.silo.templates import Turn

PLACE = "{text}"

LONGEST = 2000
"""Characters of a template."""


class Library(NamedTuple):
    """Templates, by whom each was added and in which version, the last score and the votes of every silo."""

    version: int
    templates: list[str]
    added_by: list[str]
    since: list[int]
    scores: list[list[float]]
    """By template and silo; not a number where a silo has not scored it."""
    votes: list[float]
    """Of all rounds; with an epsilon only who won, for the server keeps no other count."""
    best: int


def templates(
    ground: Ground,
    *,
    library: list[str] | None = None,
    keep: int = 12,
    offer: int = 2,
    questions: int = 32,
    epsilon: float | None = None,
    temperature: float = 0.8,
) -> Method:
    """Share templates, beginning with those of `library` and the task's own.

    A silo adds at most `offer` a round: first those in its own file, which it names itself (`silos.NAME.templates`, or
    `[data] templates` at a site: texts apart by a line of three dashes), then rewritings; `keep` templates stay.
    """
    require_no_transforms("templates", ground)
    require_counts(keep=keep, questions=questions)
    require_epsilon(epsilon)
    asking = asked_of(ground, "templates")
    for template in library or []:
        if problem := wrong(template):
            raise FedllmError(f"algorithm.library has a template that {problem}: '{template[:60]}'.")
    first = list(dict.fromkeys([asking.template, *(library or [])]))[:keep]
    places = {name: place for place, name in enumerate(ground.names)}

    def client(request: Request, silo: Silo) -> tuple[Reply, Tensors]:
        speaker, own = ground.speaker(silo), drawn(silo.data["questions"], questions, silo.seed)
        had = texts_in("templates", request.tensors)
        scores = [each.value for each in measure(speaker, asking, [filled(each) for each in had], own)]
        silo.tick(0)
        best = max(range(len(had)), key=scores.__getitem__)
        new = [] if not offer else offered(speaker, had, best, silo, offer, request.round, temperature)
        told = {"vote": torch.tensor([best])}
        if epsilon is None:
            told["scores"] = torch.tensor(scores, dtype=torch.float32)
        return Reply(request.client, request.round, {**told, **as_tensors("new", new)}, float(len(own))), silo.memory

    def server(select: Select, state: State, exchange: Exchange) -> tuple[State, Report]:
        had = library_in(state.params)
        asked = as_tensors("templates", had.templates)
        requests = [Request(name, state.round, "train", asked) for name in select(state.round)]
        found, report = gathered(exchange, requests, lambda reply: read(reply, len(had.templates), epsilon, offer))
        tally = [0.0] * len(had.templates)
        for name, (vote, scores, _) in found.items():
            tally[vote] += 1
            if scores and name in places:
                for row, score in zip(had.scores, scores, strict=True):
                    row[places[name]] = score
        noise = generator(derive(ground.seed, "votes", state.round))
        best = winner(tally, epsilon, noise)
        if epsilon is None:
            best = max(range(len(tally)), key=lambda place: (mean(had.scores[place]), tally[place], -place))
            votes = [before + now for before, now in zip(had.votes, tally, strict=True)]
            report["score"] = mean(had.scores[best])
        else:
            votes = [before + (place == best) for place, before in enumerate(had.votes)]
            report["epsilon"] = epsilon_of_votes(state.round + 1, epsilon)
        after = grown(had._replace(best=best, votes=votes), {name: new for name, (_, _, new) in found.items()}, keep)
        report |= {"templates": len(after.templates), "version": after.version}
        return state._replace(round=state.round + 1, params=tensors_of(after)), report

    def evaluated(request: Request, silo: Silo) -> Measured:
        shown = library_in(request.tensors)
        template = asking.template if request.scalars.get("base") else shown.templates[shown.best]
        return measure(ground.speaker(silo), asking, [filled(template)], silo.data["tests"])[0]

    def export(model: Any, learned: Tensors, folder: Path) -> None:
        shown = library_in(learned)
        table = [entry(shown, place, ground.names) for place in range(len(shown.templates))]
        best = shown.templates[shown.best]
        write_prompt(folder, best, asking.words, version=shown.version, best=identity(best), library=table)

    votes = "count votes" if epsilon is None else f"count votes by report noisy max, epsilon {epsilon:g} a round"
    steps = [Step("silo", "score the library, vote, add templates"), Step("server", votes)]
    sent_up = {"scores": torch.empty(keep, device="meta"), **as_tensors("new", ["x" * 4 * LONGEST] * offer)}
    algorithm = prompting(ground, client, server, steps, sent_up)
    silos = len(ground.names)
    blank = Library(1, first, [""] * len(first), [1] * len(first), unscored(len(first), silos), [0.0] * len(first), 0)
    notes = [("sends up", "a vote" + " and the scores" * (epsilon is None) + f", and {offer} templates at most")]
    if epsilon is not None:
        spent = epsilon_of_votes(ground.rounds, epsilon)
        notes.append(
            ("votes", f"epsilon {spent:g} for a silo's votes of {ground.rounds} rounds; templates not covered")
        )
    return Method("templates", tensors_of(blank), algorithm, evaluating(evaluated), export, weights=False, notes=notes)


def wrong(template: str) -> str | None:
    """Say what is wrong with a template, if anything is."""
    if template.count(PLACE) != 1:
        return f"has not {PLACE} once"
    return f"is longer than {LONGEST} characters" if len(template) > LONGEST else None


def offered(
    speaker: Speaker, had: list[str], best: int, silo: Silo, count: int, number: int, temperature: float
) -> list[str]:
    """Return templates to add: the silo's own that are not there yet, then its model's rewritings of the best."""
    own = [each for each in silo.data.get("templates", ()) if each not in had]
    ask = (
        f"Rewrite this instruction in other words. Keep {PLACE} exactly as it is, once, where the text goes.\n\n"
        f"{had[best]}\n\nRewritten instruction:"
    )
    missing = count - len(own[:count])
    how = Writing(max_tokens=96, temperature=temperature, seed=derive(silo.seed, "rewrite", number))
    texts = speaker.write([[Turn("user", ask)]] * missing, how) if missing else []
    return [each for each in dict.fromkeys([*own[:count], *texts]) if each not in had and not wrong(each)]


def read(reply: Reply, count: int, epsilon: float | None, offer: int) -> tuple[int, list[float], list[str]]:
    """Return vote, scores and new templates of a reply, or raise `Refused`."""
    vote = reply.tensors.get("vote")
    if vote is None or vote.dtype != torch.int64 or vote.shape != (1,) or not 0 <= int(vote) < count:
        raise Refused(f"its vote is not for one of {count} templates")
    new = texts_in("new", reply.tensors, offer)
    # What was redacted at the silo may be no template any more: it is left out, the rest counts.
    return int(vote), read_scores(reply, count) if epsilon is None else [], [each for each in new if not wrong(each)]


def grown(had: Library, new: dict[str, list[str]], keep: int) -> Library:
    """Return the library with what was added, each silo's in turn, and without the worst where it is too many."""
    silos = len(had.scores[0])
    added = {text: name for name in sorted(new) for text in new[name] if text not in had.templates}
    order = [
        place for place in sorted(range(len(had.templates)), key=lambda p: -mean(had.scores[p])) if place != had.best
    ]
    stay = [had.best, *order][: max(1, keep - len(added))]
    texts = list(added)[: keep - len(stay)]
    if not texts and len(stay) == len(had.templates):
        return had
    stay, version = sorted(stay), had.version + 1
    return Library(
        version,
        [had.templates[p] for p in stay] + texts,
        [had.added_by[p] for p in stay] + [added[text] for text in texts],
        [had.since[p] for p in stay] + [version] * len(texts),
        [had.scores[p] for p in stay] + unscored(len(texts), silos),
        [had.votes[p] for p in stay] + [0.0] * len(texts),
        stay.index(had.best),
    )


def mean(scores: list[float]) -> float:
    """Return the mean of the scores that there are; the lowest of all where there are none."""
    known = [score for score in scores if score == score]
    return sum(known) / len(known) if known else float("-inf")


def unscored(count: int, silos: int) -> list[list[float]]:
    """Return the scores of templates that nobody has scored."""
    return [[float("nan")] * silos for _ in range(count)]


def tensors_of(library: Library) -> Tensors:
    """Return a library as tensors."""
    return {
        **as_tensors("templates", library.templates),
        **as_tensors("added_by", library.added_by),
        "since": torch.tensor(library.since),
        "scores": torch.tensor(library.scores, dtype=torch.float32),
        "votes": torch.tensor(library.votes, dtype=torch.float32),
        "now": torch.tensor([library.version, library.best]),
    }


def library_in(tensors: Tensors) -> Library:
    """Return the library in tensors of our own."""
    texts, by = texts_in("templates", tensors), texts_in("added_by", tensors)
    version, best = tensors["now"].tolist()
    return Library(
        version, texts, by, tensors["since"].tolist(), tensors["scores"].tolist(), tensors["votes"].tolist(), best
    )


def identity(template: str) -> str:
    """Return the short name by which a template is known everywhere."""
    return hashlib.sha256(template.encode()).hexdigest()[:12]


def entry(library: Library, place: int, names: Sequence[str]) -> dict[str, Any]:
    """Return a template as the library's file has it."""
    scores = zip(names, library.scores[place], strict=True)
    return {
        "id": identity(library.templates[place]),
        "template": library.templates[place],
        "added_by": library.added_by[place] or "recipe",
        "since_version": library.since[place],
        "votes": library.votes[place],
        "scores": {name: round(score, 6) for name, score in scores if score == score},
    }
