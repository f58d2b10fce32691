"""Type and range of every setting of config.yaml that belongs to no constructor. (A constructor declares its own.)

What a key means is the comment in its yaml. Seeds of initial states are 0 to 999,999 for training and as many for
tests, where success uses the first 500,000, divergence the next 100,000 and videos the rest: hence the most of each.
"""

from __future__ import annotations

from typing import Annotated, Literal, NotRequired, TypedDict

from robot_forgetting.ranges import (
    OPEN,
    Count,
    CountOrNone,
    Environments,
    Pixels,
    Processes,
    Range,
    Seed,
    Temperature,
    Tokens,
)

Episodes = Annotated[int, Range(1, 500_000)]
EpisodesOrNone = Annotated[int, Range(0, 500_000)]


class Decode(TypedDict):
    temperature: Temperature


class Budget(TypedDict):
    """What the commands read, and what the yaml files of methods and tasks do; a budget of your own may hold more."""

    episodes: Episodes
    greedy_episodes: EpisodesOrNone
    interim_points: Annotated[int, Range(0, 1000)]
    interim_episodes: EpisodesOrNone
    divergence_episodes: Annotated[int, Range(0, 100_000)]
    divergence_states: CountOrNone
    videos: Annotated[int, Range(0, 1000)]
    items: NotRequired[Count | None]
    texts: NotRequired[Annotated[int, Range(1, 100_000)]]
    benchmark_tokens: NotRequired[Tokens]
    benchmark_rows: NotRequired[Annotated[int, Range(1, 65_536)]]
    demonstrations: NotRequired[Count]
    sft_iterations: NotRequired[Count]
    rl_iterations: NotRequired[Count]
    reinforce_iterations: NotRequired[Count]
    text_warmup_steps: NotRequired[CountOrNone]
    text_steps: NotRequired[Count]
    text_batch: NotRequired[Count]
    text_group: NotRequired[Count]


class HeldOutText(TypedDict):
    source: str | None
    number: Annotated[int, Range(4, 100_000)]  # see ``layer_states.LEAST``
    characters: Count
    neighbours: Annotated[int, Range(1, 100_000)]


class Pretrain(TypedDict):
    demonstrations: dict[str, CountOrNone]
    iterations: Count
    steps_per_iteration: Count
    batch_size: Count
    label_sigma: Annotated[float, Range(0, 256)]
    episodes: Episodes
    optimiser: dict  # of method.Optimiser, which declares it


class Settings(TypedDict):
    """The keys of config.yaml beside the groups."""

    sequence: list[str] | None
    prior: list[str]
    held_out: list[str]
    kind: Literal["robot", "text"]
    seed: Seed
    episodes: Episodes | None
    seed_start: Annotated[int, Range(0, 1_999_999)] | None
    limit: Count | None
    measures: list[str]
    held_out_text: HeldOutText
    allow_code_execution: bool | str
    decode: Decode
    answer_tokens: NotRequired[Tokens]
    budget: Annotated[Budget, OPEN]
    pretrain: Pretrain
    sweep: str
    run_dir: str | None
    output: str | None
    sections: list[str]
    render: str
    image_size: Pixels
    full_pictures: bool
    num_envs: Environments
    processes: Processes
    simulation: str
    device: str
    checkpoint: str | None
    keep_stages: bool
    quick: bool
    golden: str | None
    recordings: str | None
    debug: bool


Root = Annotated[Settings, OPEN]  # the groups, and what a task's yaml adds for others to read
