# Your own images: copies out, then a page and a map of what is left.
#
#     make -f examples/own-images.mk IMAGES=~/photos
#
# With a model (a run, or released weights: `dinov2 models pull dinov2_vits14`) also a curated set: the images most like
# those in SEEDS, or without SEEDS a balanced sample.
#
#     make -f examples/own-images.mk IMAGES=~/photos MODEL=dinov2_vits14 SEEDS=~/wanted
#     make -f examples/own-images.mk IMAGES=~/photos MODEL=dinov2_vits14 train      # goes on from MODEL; a GPU is needed
#     make -f examples/own-images.mk IMAGES=~/icons RECIPE=tiny train               # from nothing; small images
#     make -f examples/own-images.mk IMAGES=~/photos TRAIN=labelled/train TEST=labelled/test probe
#
# Everything is written to OUT. Run it again after IMAGES has changed: only new images are read. (After SEEDS has
# changed, remove OUT/queries.parquet.) Names may have spaces, but OUT may not.
IMAGES ?=
OUT ?= out
MODEL ?=
SEEDS ?=
SAMPLE ?= 1000
CLUSTERS ?= 100,10
RECIPE ?= tiny
STEPS ?= 2000
TRAIN ?=
TEST ?=

.DELETE_ON_ERROR:
.PHONY: all train probe FORCE
# ~ is the home folder, also for shells that leave it as it is.
home = $(if $(filter ~/%,$(firstword $1)),$(HOME)/$(subst ~/,,$1),$1)
$(foreach name,IMAGES MODEL SEEDS TRAIN TEST,$(eval override $(name) := $$(call home,$$($(name)))))
export IMAGES MODEL SEEDS TRAIN TEST
export DINOV2_CATALOG = $(OUT)/catalog.duckdb
ifneq ($(words $(OUT)),1)
$(error OUT is "$(OUT)"; name a folder without spaces)
endif
ifeq ($(strip $(IMAGES)),)
$(error IMAGES is not given; name a folder: make -f examples/own-images.mk IMAGES=~/photos)
endif
SETS = $(OUT)/files.parquet $(OUT)/unique.parquet $(if $(MODEL),$(OUT)/curated.parquet)
FEATURES = $(OUT)/$(if $(MODEL),features,unique).parquet

all: $(OUT)/report.html $(OUT)/map.html

# What is in the folder; written only when that has changed.
$(OUT)/listing.txt: FORCE
	@mkdir -p $(OUT) && cd "$$IMAGES" && find . -type f -exec ls -ln {} + > "$(abspath $@).new"
	@cmp -s $@.new $@ && rm $@.new || mv $@.new $@

# Every image, with a descriptor made to find copies; then one of each group of copies.
$(OUT)/files.parquet: $(OUT)/listing.txt
	dinov2 curate embed "$$IMAGES" -o $@ --model copy --min-contrast 2
$(OUT)/unique.parquet: $(OUT)/files.parquet
	dinov2 curate dedup $< -o $@ --force

# With a model: its features, and the images like the seeds or a balanced sample.
$(OUT)/features.parquet: $(OUT)/unique.parquet
	dinov2 curate embed $< -o $@ --model "$$MODEL" --force
$(OUT)/queries.parquet:
	dinov2 curate embed "$$SEEDS" -o $@ --model "$$MODEL" --role queries
ifneq ($(MODEL)$(SEEDS),$(MODEL))
$(OUT)/curated.parquet: $(OUT)/features.parquet $(OUT)/queries.parquet
	dinov2 curate retrieve --queries $(OUT)/queries.parquet --pool $< -o $@ --k 16 --force
else
$(OUT)/curated.parquet: $(OUT)/features.parquet
	dinov2 curate cluster $< -o $@ --num-clusters $(CLUSTERS) --sample $(SAMPLE) --force
endif

# The page, and the map.
$(OUT)/report.html: $(SETS) $(OUT)/map.html
	dinov2 report $(SETS) -o $@ --force
$(OUT)/map.html: $(FEATURES)
	dinov2 curate map $< -o $(OUT)/map.parquet --html $@ --force

# Training, from MODEL or from nothing, and scores on labelled folders (TRAIN/LABEL/..., TEST/LABEL/...).
train: $(OUT)/run/model.json
$(OUT)/run/model.json: $(if $(MODEL),$(OUT)/curated.parquet,$(OUT)/unique.parquet)
	dinov2 train pretrain $< -o $(OUT)/run --recipe $(RECIPE) $(if $(MODEL),--init-from "$$MODEL") \
	  --set steps=$(STEPS) --resume
probe: $(OUT)/run/model.json
	dinov2 evaluate probe --train "$$TRAIN" --test "$$TEST" --method knn --method linear \
	  --model pixels --model $(OUT)/run -o $(OUT)/scores.parquet --force

FORCE:
