# Works in a fresh clone with Python >= 3.11 and make; `setup` installs the rest into .venv.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/setup-done
SEEDS ?= 0,1,2
BRIDGE := task=widowx_carrot_on_plate 'prior=[widowx_spoon_on_towel,widowx_stack_cube]' 'held_out=[]'
GOOGLE := task=google_robot_pick_standing_coke_can \
	'prior=[google_robot_open_top_drawer,google_robot_close_top_drawer]' 'held_out=[]'
GOOGLE_DEMONSTRATIONS := 'pretrain.demonstrations={google_robot_open_top_drawer: 300, \
	google_robot_close_top_drawer: 200, google_robot_pick_standing_coke_can: 80}'
# One thread per process: environment workers and the policy share the cores, and threads fighting over them are slower.
export OMP_NUM_THREADS ?= 1
# Of ROS or another environment: its packages would go before ours.
unexport PYTHONPATH PYTHONHOME

.PHONY: help setup test demo base three-seeds bridge-base bridge google-base google nano-base benchmark wheel lint clean

help:
	@echo "make setup        install into .venv, and a Vulkan driver where there is none"
	@echo "make demo         the benchmark in small: three methods, one seed, one report with videos"
	@echo "make three-seeds  the same over 3 seeds"
	@echo "make base         train the base policy anew, in two phases, into runs/base/ (about 20 minutes)"
	@echo "make bridge       SimplerEnv's WidowX tasks: SFT and GRPO, 3 seeds, two hours; first: robot-forgetting assets bridge"
	@echo "make bridge-base  train their base policy anew into runs/bridge-base/ (about an hour)"
	@echo "make google       SimplerEnv's Google robot: SFT and GRPO, 3 seeds, about 7 hours; first: robot-forgetting assets google_robot"
	@echo "make google-base  train its base policy anew into runs/google-base/ (an hour and a half)"
	@echo "make nano-base    train the small language model anew into runs/nano-base/ (about half an hour)"
	@echo "make test         the tests"
	@echo "make benchmark    the speed ratios"
	@echo "make wheel        dist/*.whl"
	@echo "make lint         ruff"
	@echo "make clean        remove .venv and what builds left; runs/ and videos/ stay"

# Typed by hand it always looks again (a driver may have gone); the others only need that it was done once.
setup:
	$(PYTHON) scripts/install.py
	@touch $(STAMP)

$(STAMP): pyproject.toml requirements.lock scripts/install.py
	@$(MAKE) --no-print-directory setup

test: $(STAMP)
	$(BIN)/python -m pytest $(ARGS)

# Without the held-out task, on which nothing succeeds before or after: it would be a third of the evaluation's time.
demo: $(STAMP)
	$(BIN)/robot-forgetting run --multirun method=sft,grpo,reinforce seed=0 sweep=demo budget=demo 'held_out=[]'
	$(BIN)/robot-forgetting report runs/demo/*/ output=runs/demo/report.html

# Smoothed labels first, plain ones after: docs/action_tokens.md says why.
base: $(STAMP)
	$(BIN)/robot-forgetting pretrain policy=openvla-nano-new run_dir=runs/base/first output=runs/base/first/policy
	$(BIN)/robot-forgetting pretrain policy=openvla-nano policy.checkpoint=runs/base/first/policy \
		'pretrain.demonstrations={pick_cube: 250, push_cube: 120, pull_cube: 120, stack_cube: 3}' \
		pretrain.iterations=20 pretrain.label_sigma=0 \
		pretrain.optimiser.learning_rate=7e-4 pretrain.optimiser.warmup_steps=20 \
		run_dir=runs/base/second output=runs/base/policy

three-seeds: $(STAMP)
	$(BIN)/robot-forgetting run --multirun method=sft,grpo seed=$(SEEDS) sweep=three-seeds budget=table
	$(BIN)/robot-forgetting report runs/three-seeds/*/ output=runs/three-seeds/report.html

bridge-base: $(STAMP)
	$(BIN)/robot-forgetting pretrain policy=openvla-nano-bridge-new $(BRIDGE) pretrain.iterations=120 \
		'pretrain.demonstrations={widowx_spoon_on_towel: 800, widowx_stack_cube: 800, widowx_carrot_on_plate: 100}' \
		pretrain.episodes=6 run_dir=runs/bridge-base/first output=runs/bridge-base/first/policy
	$(BIN)/robot-forgetting pretrain policy=openvla-nano-bridge policy.checkpoint=runs/bridge-base/first/policy \
		$(BRIDGE) pretrain.iterations=45 pretrain.label_sigma=0 pretrain.episodes=24 \
		'pretrain.demonstrations={widowx_spoon_on_towel: 400, widowx_stack_cube: 400, widowx_carrot_on_plate: 50}' \
		pretrain.optimiser.learning_rate=7e-4 pretrain.optimiser.warmup_steps=20 \
		run_dir=runs/bridge-base/second output=runs/bridge-base/policy

google-base: $(STAMP)
	$(BIN)/robot-forgetting pretrain policy=openvla-nano-google-new $(GOOGLE) pretrain.iterations=100 \
		$(GOOGLE_DEMONSTRATIONS) \
		pretrain.episodes=4 run_dir=runs/google-base/first output=runs/google-base/first/policy
	$(BIN)/robot-forgetting pretrain policy=openvla-nano-google policy.checkpoint=runs/google-base/first/policy \
		$(GOOGLE) pretrain.iterations=30 pretrain.label_sigma=0 pretrain.episodes=27 \
		$(GOOGLE_DEMONSTRATIONS) \
		pretrain.optimiser.learning_rate=7e-4 pretrain.optimiser.warmup_steps=20 \
		run_dir=runs/google-base/second output=runs/google-base/policy

# Sums are the hardest of the skills: the second phase is mostly about them.
nano-base: $(STAMP)
	$(BIN)/robot-forgetting pretrain policy=qwen-nano-new task=skill_over task.annotator=any processes=1 \
		'pretrain.demonstrations={skill_reverse: 15000, skill_sort: 15000, skill_add: 15000, skill_count: 4000, skill_over: 8000}' \
		pretrain.iterations=60 pretrain.steps_per_iteration=50 \
		run_dir=runs/nano-base/first output=runs/nano-base/first/policy
	$(BIN)/robot-forgetting pretrain policy=qwen-nano policy.checkpoint=runs/nano-base/first/policy task=skill_over \
		task.annotator=any processes=1 \
		'pretrain.demonstrations={skill_reverse: 4000, skill_sort: 4000, skill_add: 30000, skill_count: 2000, skill_over: 4000}' \
		pretrain.iterations=35 pretrain.steps_per_iteration=50 pretrain.episodes=400 \
		pretrain.optimiser.learning_rate=1e-3 pretrain.optimiser.warmup_steps=50 \
		run_dir=runs/nano-base/second output=runs/nano-base/policy

# Seed 0 would clone the very demonstrations that the base policy has seen.
bridge: $(STAMP)
	$(BIN)/robot-forgetting run --multirun seed=1,2,3 method=sft,grpo sweep=bridge budget=simpler \
		policy=openvla-nano-bridge $(BRIDGE)
	$(BIN)/robot-forgetting report runs/bridge/*/ output=runs/bridge/report.html

google: $(STAMP)
	$(BIN)/robot-forgetting run --multirun seed=1,2,3 method=sft,grpo sweep=google budget=google \
		policy=openvla-nano-google $(GOOGLE)
	$(BIN)/robot-forgetting report runs/google/*/ output=runs/google/report.html

benchmark: $(STAMP)
	for script in tests/benchmarks/bench_*.py; do $(BIN)/python $$script || exit 1; done

wheel: $(STAMP)
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation -w dist .

lint: $(STAMP)
	$(BIN)/ruff check .

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache
