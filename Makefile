# `make demo` and `make test` work in a fresh clone. Both install the environment first if it is missing.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
THREADS := $(shell nproc)
# The decision maker takes the longest, so it starts first. As many roles train side by side as there are cores.
THREADS_PER_ROLE := $(shell expr \( $(THREADS) + 3 \) / 4)
ROLES := decision_maker reasoning_expert knowledge_guide reference_extractor

# The smoke size shows that every step runs. Its figures mean nothing.
ifdef SMOKE
DATA := --parts 12
TRAIN := --max_steps 3
NAME := smoke
else
NAME := demo
endif

# Threads that wait give their core to others instead of spinning, which is ten times faster on busy machines.
export OMP_WAIT_POLICY = PASSIVE

.PHONY: install demo adapt-from tiles test test-slow style types pictures clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(INSTALLED)
	rm -rf runs/$(NAME) data/$(NAME)
	$(BIN)/python -m data_prep.build --config recipes/tiny/data.yaml --output data/$(NAME) $(DATA)
	mkdir -p runs/$(NAME)
	printf '%s\n' $(ROLES) | xargs -P $(THREADS) -n 1 sh -c '$(BIN)/python -m train.launch \
	  --config_file recipes/accelerate/cpu.yaml --num_cpu_threads_per_process $(THREADS_PER_ROLE) train/sft.py \
	  --config recipes/tiny/$$0.yaml --dataset data/$(NAME) --output_dir runs/$(NAME)/adapters/$$0 \
	  --disable_tqdm true --eval_strategy no $(TRAIN) > runs/$(NAME)/$$0.log 2>&1 && echo "trained $$0: runs/$(NAME)/$$0.log" \
	  || { cat runs/$(NAME)/$$0.log; exit 255; }'
	$(BIN)/python -m evaluation.run --config recipes/tiny/run.yaml --dataset data/$(NAME) --output runs/$(NAME)/base
	$(BIN)/python -m evaluation.run --config recipes/tiny/run.yaml --dataset data/$(NAME) --output runs/$(NAME)/tuned \
	  --adapters runs/$(NAME)/adapters
	$(BIN)/python -m evaluation.score runs/$(NAME)/base
	$(BIN)/python -m evaluation.score runs/$(NAME)/tuned
	$(BIN)/python -m train.export --adapters runs/$(NAME)/adapters --report runs/$(NAME)/tuned/report.json \
	  --output runs/$(NAME)/bundle
	$(BIN)/python -m evaluation.compare runs/$(NAME)/base runs/$(NAME)/tuned

# Compare adapters that act from the prefix, the branch and the answer on, with the dataset of the last demo. All are
# trained with the options of all_roles.yaml. Only defects are cases of the guide and the reasoner, on average two in a
# step of four, so their own runs take two cases per step. The vision tower is frozen, so all runs share its features.
SEEDS ?= 0 1 2
STARTS := runs/$(NAME)/adapt_from
TRAIN_FROM := $(BIN)/python -m train.launch --config_file recipes/accelerate/cpu.yaml --num_cpu_threads_per_process \
  $(THREADS_PER_ROLE) train/sft.py --config recipes/tiny/all_roles.yaml --dataset data/$(NAME) \
  --features $(STARTS)/features --eval_strategy no --disable_tqdm true $(TRAIN)

adapt-from: $(INSTALLED)
	rm -rf $(STARTS)
	for seed in $(SEEDS); do \
	  for start in branch answer; do \
	    echo --adapt_from $$start --seed $$seed --output_dir $(STARTS)/adapters/$$start-$$seed; \
	  done; \
	  for role in $(ROLES); do \
	    case $$role in \
	      decision_maker) own="--learning_rate 1.0e-3" ;; \
	      reference_extractor) own= ;; \
	      *) own="--per_device_train_batch_size 2" ;; \
	    esac; \
	    echo --adapt_from prefix --role $$role --by_role {} $$own --seed $$seed \
	      --output_dir $(STARTS)/adapters/prefix-$$seed/$$role; \
	  done; \
	done | xargs -P $(THREADS) -L 1 $(TRAIN_FROM)
	for run in $$(ls $(STARTS)/adapters); do \
	  echo --adapters $(STARTS)/adapters/$$run --output $(STARTS)/$$run; \
	done | xargs -P $(THREADS) -L 1 $(BIN)/python -m evaluation.run --config recipes/tiny/run.yaml --dataset data/$(NAME)
	$(BIN)/python -m evaluation.compare $$(for start in prefix branch answer; do \
	  echo $$start=$$(ls -d $(STARTS)/$$start-* | paste -sd,); done) --output $(STARTS)/compare

# Train the decision maker for magnetic tiles with each seed, and compare its runs with the base model. The vision tower is
# frozen, so all seeds share its features. The decision maker sees the best-ranked reference and answers alone, so a
# single step is enough for the adapters of the other roles. ROOT contains the folders MT_Blowhole to MT_Uneven.
TILES := runs/magnetic_tile/seeds
OTHERS := $(filter-out decision_maker,$(ROLES))

tiles: $(INSTALLED)
	rm -rf $(TILES) data/magnetic_tile
	$(BIN)/python -m data_prep.build --config recipes/magnetic_tile/data.yaml --root $(ROOT)
	{ \
	  for seed in $(SEEDS); do \
	    echo decision_maker.yaml --seed $$seed --output_dir $(TILES)/adapters/$$seed/decision_maker --num_train_epochs 2 \
	      --features $(TILES)/features --lora_target_modules q_proj k_proj v_proj o_proj gate_proj up_proj down_proj; \
	  done; \
	  for role in $(OTHERS); do echo $$role.yaml --output_dir $(TILES)/others/$$role --max_steps 1; done; \
	} | sed 's|^|recipes/magnetic_tile/|' | xargs -P $(THREADS) -L 1 $(BIN)/python -m train.launch \
	  --config_file recipes/accelerate/cpu.yaml --num_cpu_threads_per_process $(THREADS_PER_ROLE) train/sft.py \
	  --eval_strategy no --disable_tqdm true --config
	{ \
	  echo --output $(TILES)/base; \
	  for seed in $(SEEDS); do \
	    cp -r $(OTHERS:%=$(TILES)/others/%) $(TILES)/adapters/$$seed && \
	    echo --adapters $(TILES)/adapters/$$seed --output $(TILES)/tuned$$seed; \
	  done; \
	} | xargs -P $(THREADS) -L 1 $(BIN)/python -m evaluation.run --config recipes/magnetic_tile/run.yaml --references 1 \
	  --knowledge none --reasoning off
	$(BIN)/python -m evaluation.compare $(TILES)/base tuned=$$(ls -d $(TILES)/tuned* | paste -sd,)

# Two workers, each with one file at a time. Most of the time goes into starting commands.
test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

style: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(INSTALLED)
	$(BIN)/mypy

# Take the screenshots for the documentation from the pages of the last demo. Needs chromium.
CHROMIUM ?= chromium
SHOOT := $(CHROMIUM) --headless --no-sandbox --disable-gpu --hide-scrollbars
# A page that scrolls to its cases is blank above them, by a height that depends on the page.
CROP := $(BIN)/python -c "import sys; from PIL import Image, ImageChops; path = sys.argv[1]; \
  image = Image.open(path).convert('RGB'); blank = Image.new('RGB', image.size, image.getpixel((0, 0))); \
  top = max(0, ImageChops.difference(image, blank).getbbox()[1] - 16); image.crop((0, top, *image.size)).save(path, optimize=True)"

pictures: $(INSTALLED)
	mkdir -p docs/images
	$(SHOOT) --window-size=1000,1060 --screenshot=docs/images/compare.png "file://$(CURDIR)/runs/demo/compare/compare.html"
	$(SHOOT) --window-size=1000,835 --screenshot=docs/images/report.png "file://$(CURDIR)/runs/demo/tuned/report.html"
	$(SHOOT) --window-size=1200,1845 --screenshot=docs/images/preview.png \
	  "file://$(CURDIR)/data/demo/preview.html#condition=missing%20ball"
	$(CROP) docs/images/preview.png

# The user's own datasets and runs stay.
clean:
	rm -rf runs/demo data/demo runs/smoke data/smoke
