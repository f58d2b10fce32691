"""Conformance checks of a task: description, seeds, environment, pictures, determinism, time limit, expert."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from robot_forgetting.conformance.check_table import NotApplicable, Table, expect
from robot_forgetting.conformance.one_step_checks import check_one_step
from robot_forgetting.contracts import checked_demonstrations, checked_pictures, checked_task, checked_transition
from robot_forgetting.engine.preflight import TRIED_SEED, still
from robot_forgetting.machine.files import disk
from robot_forgetting.metrics.statistics import wilson
from robot_forgetting.task import Demonstration, Task, Transition, VectorEnv

EXPERT_EPISODES = 20
LEAST_SUCCESS = 0.8


def check_task(table: Table, task: Task, output: Path | None = None, episodes: int | None = None) -> bool:
    """All checks; whether one failed.

    output: where to write a picture of four initial states, enlarged
    episodes: initial states of the evaluation on which the expert is run too, for the upper bound of a table
    """
    before = sum(row.state == "FAIL" for row in table.rows)
    table.section(f"task {getattr(task, 'name', type(task).__name__)}")
    table.check("description", lambda: _description(task))
    seeds_fine = table.check("seeds", lambda: _seeds(task))
    spec_fine = table.check("convention", lambda: _convention(task))
    if seeds_fine and spec_fine and task.one_step:
        check_one_step(table, task)
    elif seeds_fine and spec_fine:
        _check_environment(table, task, output)
        _check_expert(table, task, episodes)
    return sum(row.state == "FAIL" for row in table.rows) > before


# ---- what the task says of itself


def _description(task: Task) -> str:
    checked_task(task)
    expect(
        isinstance(task.name, str) and re.fullmatch(r"[A-Za-z0-9_.]+", task.name),
        f"name {task.name!r} becomes part of file names; use letters, digits and underscores",
    )
    expect(
        task.one_step or task.instruction.strip(),
        f"instruction {task.instruction!r} is not a sentence; tell the policy what to do",
    )
    if task.one_step:
        expect(task.max_steps == 1, f"max_steps is {task.max_steps}, but a one-step task has one decision")
        return "one decision per episode"
    return f"'{task.instruction}', at most {task.max_steps} steps"


def _seeds(task: Task) -> str:
    train, test = task.seeds("train"), task.seeds("test")
    for split, seeds in (("train", train), ("test", test)):
        expect(isinstance(seeds, range), f"seeds('{split}') is {type(seeds).__name__}; return a range")
        expect(len(seeds) >= 1000, f"seeds('{split}') holds {len(seeds)} seeds; training and evaluation need thousands")
        expect(seeds[0] >= 0, f"seeds('{split}') starts at {seeds[0]}; seeds must not be negative")
    shared = range(max(train[0], test[0]), min(train[-1], test[-1]) + 1)
    expect(
        not len(shared) or (train.step > 1 and not set(train) & set(test)),
        f"train and test share seeds {shared[0] if shared else ''}..; make the ranges disjoint",
    )
    return f"train {train[0]}..{train[-1]}, test {test[0]}..{test[-1]}"


def _convention(task: Task) -> str:
    spec = task.convention()
    if task.one_step:
        expect(spec.action_mode, "convention() leaves action_mode open; say what an answer is, as in 'label' or 'text'")
        return f"answers: {spec.action_mode}"
    empty = [field.name for field in dataclasses.fields(spec) if getattr(spec, field.name) is None]
    expect(not empty, f"convention() leaves open: {', '.join(empty)}; a task commits itself to every field")
    return f"{spec.action_mode}, {spec.rotation}, gripper {spec.gripper}, {spec.image_size} px, {spec.control_hz} Hz"


# ---- the environment


class Player:
    """Drives a VectorEnv: ``advance`` sends resets and commands by slot and gathers all answers."""

    def __init__(self, env: VectorEnv):
        self.env = env

    def advance(self, resets: dict[int, int], commands: dict[int, np.ndarray]) -> dict[int, Transition]:
        asked, answers = 0, {}
        for group, members in enumerate(self.env.groups):
            mine = {slot: seed for slot, seed in resets.items() if slot in members}
            steps = {slot: command for slot, command in commands.items() if slot in members}
            if mine or steps:
                self.env.request(group, mine, steps)
                asked += 1
        for _ in range(asked):
            for transition in self.env.wait()[1]:
                answers[checked_transition(self.env, transition).slot] = transition
        missing = (resets.keys() | commands.keys()) - answers.keys()
        expect(not missing, f"no answer for slots {sorted(missing)}; wait() returns one Transition per requested slot")
        return answers

    def reset(self, slot: int, seed: int) -> Transition:
        transition = self.advance({slot: seed}, {})[slot]
        expect(transition.error is None, f"reset(seed={seed}) crashed: {transition.error}; correct the environment")
        expect(not transition.done, "an episode is done right after its reset; no initial state may be a success")
        return transition

    def step(self, slot: int, command: np.ndarray) -> Transition:
        transition = self.advance({}, {slot: command})[slot]
        expect(transition.error is None, f"a step crashed: {transition.error}; correct the environment")
        return transition


def _check_environment(table: Table, task: Task, output: Path | None) -> None:
    made: list[VectorEnv] = []

    def start() -> str:
        made.append(task.make_env(2))
        slots = [slot for group in made[0].groups for slot in group]
        expect(sorted(slots) == [0, 1], f"make_env(2) has slots {slots}; its groups must hold 0 and 1 once each")
        return f"2 slots in {len(made[0].groups)} group(s)"

    try:
        if not table.check("environment starts", start):
            return
        player, first = Player(made[0]), task.seeds("train")[TRIED_SEED % len(task.seeds("train"))]
        if not table.check("reset and picture", lambda: _picture(task, player, first)):
            return
        if output is not None:
            table.check("initial states", lambda: _show(player, first, output))
        table.check("same seed, same start", lambda: _start_states(player, first))
        table.check("pictures change", lambda: _motion(task, player, first))
        table.check("same commands, same end", lambda: _repeatable(task, player, first))
        table.check("time limit", lambda: _time_limit(task, player, first))
        table.check("a crash is reported", lambda: _crash(player, first))
    finally:
        for env in made:
            env.close()


def _picture(task: Task, player: Player, seed: int) -> str:
    row = player.reset(0, seed).observation
    checked_pictures(task, player.env, row)
    _instruction(task, row)
    image = row["image"]
    expect(
        image.std() >= 2,
        f"the picture is blank (standard deviation {image.std():.1f} of 255); look at the camera's eye and target, "
        "and run `robot-forgetting doctor`",
    )
    camera = f", from {player.env.camera}" if hasattr(player.env, "camera") else ""
    return f"uint8 {list(image.shape)}, grey values {image.min()} to {image.max()}{camera}"


def _show(player: Player, seed: int, output: Path) -> str:
    import imageio.v3 as imageio

    row = np.concatenate([player.reset(0, seed + index).observation["image"] for index in range(4)], axis=1)
    enlarged = row.repeat(4, axis=0).repeat(4, axis=1)
    with disk(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        imageio.imwrite(output, enlarged)
    return f"as the policy sees them: {output}"


def _start_states(player: Player, seed: int) -> str:
    first, other = player.reset(0, seed).observation["image"], player.reset(0, seed + 1).observation["image"]
    again, beside = player.reset(0, seed).observation["image"], player.reset(1, seed).observation["image"]
    expect(
        np.array_equal(first, again),
        f"seed {seed} twice gives two different first pictures; draw the initial state from the episode's seed alone",
    )
    expect(
        np.array_equal(first, beside),
        f"seed {seed} looks different in slots 0 and 1; nothing may depend on the slot or on earlier episodes",
    )
    expect(
        not np.array_equal(first, other),
        f"seeds {seed} and {seed + 1} start alike; the initial state ignores its seed, or the camera does not see it",
    )
    return ""


def _instruction(task: Task, row: dict) -> None:
    own = " or ".join(map(repr, task.sentences[:3])) + (" ..." if len(task.sentences) > 3 else "")
    expect(
        row["instruction"] in task.sentences,
        f"the observation's instruction is {row['instruction']!r}, the task's {own}; use one",
    )


def _motion(task: Task, player: Player, seed: int) -> str:
    transition = player.reset(0, seed)
    before, changed = transition.observation["image"], 0.0
    for index in range(min(8, task.max_steps)):
        command = np.array([0.5, 0.5 * (-1) ** (index // 4), -0.3, 0, 0, 0, 1], np.float32) * _unit(task)
        transition = player.step(0, command)
        expect(np.isfinite(transition.reward), f"the reward is {transition.reward}; it must be finite")
        changed = max(changed, float((transition.observation["image"] != before).any(-1).mean()))
        if transition.done:
            break
    expect(
        changed > 0.002,
        "the picture does not change while the robot moves; the camera looks elsewhere, or pictures are not refreshed",
    )
    return f"up to {changed:.0%} of the pixels"


def _unit(task: Task) -> np.ndarray:
    """What scales commands to steps of at most 0.1 m: the WidowX's are metres, the Panda's tenths of one."""
    metres = getattr(getattr(task, "robot", None), "metres_per_unit", 0.1)
    return np.array([0.1 / metres] * 6 + [1], np.float32)


def _repeatable(task: Task, player: Player, seed: int) -> str:
    rng = np.random.default_rng(seed)
    commands = rng.uniform(-0.5, 0.5, (min(10, task.max_steps), 7)).astype(np.float32) * _unit(task)

    def play(slot: int) -> list[Transition]:
        player.reset(slot, seed)
        transitions = []
        for command in commands:
            transitions.append(player.step(slot, command))
            if transitions[-1].done:
                break
        return transitions

    first, again, beside = play(0), play(0), play(1)
    for other, where in ((again, "in the same slot"), (beside, "in another slot")):
        same = len(other) == len(first) and all(
            a.reward == b.reward and np.array_equal(a.observation["image"], b.observation["image"])
            for a, b in zip(first, other, strict=True)
        )
        expect(
            same,
            f"the same seed and commands end differently {where}; reset everything that an episode changes, and draw "
            "random numbers from the episode's seed",
        )
    return f"{len(first)} random steps, twice in one slot and once in another"


def _time_limit(task: Task, player: Player, seed: int) -> str:
    player.reset(1, seed)
    for step in range(1, task.max_steps + 1):
        transition = player.step(1, still(task))
        _instruction(task, transition.observation)
        if transition.done:
            early = step < task.max_steps and not transition.success
            how = "by success, though the robot did not move" if transition.success else "ended by the environment"
            return f"step {step} of {task.max_steps}" + (f", {how}" if early or transition.success else "")
    expect(False, f"the episode goes on after max_steps = {task.max_steps}; set done at the time limit")


def _crash(player: Player, seed: int) -> str:
    """A command of the wrong shape stands for any crash inside the environment."""
    player.reset(0, seed)
    try:
        transition = player.advance({}, {0: np.zeros(3, np.float32)})[0]
    except Exception as error:
        complaint = f"a crash in the environment ends the program ({type(error).__name__}: {str(error)[:80]})"
        expect(False, f"{complaint}; catch it and return Transition(done=True, error='...')")
    expect(
        transition.error is not None,
        "a command with 3 numbers in place of 7 is accepted in silence; let the environment refuse it",
    )
    expect(transition.done and not transition.success, "a crashed episode must be done, and no success")
    expect(
        "\n" not in transition.error and transition.error.strip(), "the error must be one line that says what happened"
    )
    player.reset(0, seed)  # the slot lives on
    return transition.error[:80]


# ---- the expert


def _check_expert(table: Table, task: Task, episodes: int | None) -> None:
    if getattr(getattr(task, "spec", None), "expert", None) is not None:
        table.check("expert without noise", lambda: _expert(task))
        if episodes:
            table.check("expert in evaluation", lambda: _expert_in_evaluation(task, episodes))
    table.check("demonstrations", lambda: _demonstrations(task, 4))


def _expert_episodes(task, seeds: Sequence[int]) -> tuple[list[int], float]:
    """The seeds on which the undisturbed expert fails, and its mean number of steps."""
    from robot_forgetting.tasks.simulator.workers import demonstrate

    noise = {"small": 0.0, "kick": 0.0, "kick_probability": 0.0}
    lost, steps = [], []
    for seed, success, rows, commands in demonstrate(task.spec, list(seeds), noise, task.processes):
        _commands(task, Demonstration(observations=rows, commands=commands, seed=seed))
        steps.append(len(commands))
        if not success:
            lost.append(seed)
    return lost, float(np.mean(steps))


def _expert(task) -> str:
    first = TRIED_SEED % len(task.seeds("train"))
    seeds = task.seeds("train")[first : first + EXPERT_EPISODES]
    lost, steps = _expert_episodes(task, seeds)
    won = len(seeds) - len(lost)
    expect(
        won >= LEAST_SUCCESS * len(seeds),
        f"it succeeds in {won} of {len(seeds)} episodes without noise, {LEAST_SUCCESS:.0%} are asked for; watch the "
        f"seeds it loses ({', '.join(map(str, lost[:5]))}), or raise max_steps ({task.max_steps})",
    )
    return f"{won} of {len(seeds)} succeed, {steps:.0f} steps on average"


def _expert_in_evaluation(task, episodes: int) -> str:
    """A number for a table, not a demand: however low, it is no failure of the task."""
    seeds = task.evaluation_seeds(episodes)
    lost, steps = _expert_episodes(task, seeds)
    won = len(seeds) - len(lost)
    low, high = wilson(won, len(seeds))
    where = f"; loses seeds {', '.join(map(str, lost[:8]))}" if lost else ""
    return f"{won} of {len(seeds)} succeed, {won / len(seeds):.2f} [{low:.2f}, {high:.2f}], {steps:.0f} steps{where}"


def _commands(task: Task, episode: Demonstration) -> None:
    """One expert episode's columns and commands."""
    commands = episode.commands
    spec, where = task.convention(), f"in the episode of seed {episode.seed}"
    checked_demonstrations(task, [episode])
    expect(
        commands.ndim == 2 and commands.shape[1] == spec.action_dimensions,
        f"commands have shape {list(commands.shape)} {where}; each needs {spec.action_dimensions} numbers",
    )
    expect(np.isfinite(commands).all(), f"a command is not finite {where}; look for divisions by zero in the expert")
    expect(
        np.abs(commands).max() <= 1 + 1e-6,
        f"a command reaches {np.abs(commands).max():.2f} {where}; commands are in [-1, 1] (1 is 0.1 m or 0.1 rad)",
    )
    size, images = spec.image_size, np.asarray(episode.observations.get("image", ()))
    expect(
        size is None or (images.dtype == np.uint8 and images.shape[1:] == (size, size, 3)),
        f"pictures are {images.dtype} {list(images.shape[1:])} {where}; convention() says uint8 [{size}, {size}, 3]",
    )
    expect(len(commands) <= task.max_steps, f"{len(commands)} steps {where}; max_steps is {task.max_steps}")


def _demonstrations(task: Task, count: int) -> str:
    recorded, train = task.demonstration_count, task.seeds("train")
    start = TRIED_SEED % len(train) if recorded is None else 0
    if not task.has_demonstrations:
        raise NotApplicable("none: methods that clone an expert (sft) will refuse this task")
    count = count if recorded is None else recorded
    episodes: Sequence = list(task.demonstrations(count, start=start))
    expect(len(episodes) == count, f"demonstrations({count}) gave {len(episodes)}; give as many as are asked for")
    for episode in episodes:
        _commands(task, episode)
        said = episode.observations.get("instruction", ())
        expect(set(said) <= set(task.sentences), "a demonstration carries another instruction than its task")
        expect(episode.seed in train, f"seed {episode.seed} is not of the training split asked for")
    seeds = [episode.seed for episode in episodes]
    expect(seeds == sorted(set(seeds)), f"seeds {seeds} are not in order or repeat; one episode per seed, in order")
    kept = f"{count} of {seeds[-1] - train[start] + 1} episodes kept"
    if recorded is not None:
        kept = f"{recorded} recorded, {task.held_out_count} of them for divergences alone"
        expect(not list(task.demonstrations(1, start=recorded)), "demonstrations() goes on after demonstration_count")
    return f"{kept}, {sum(len(e.commands) for e in episodes)} decisions"
