"""Every field of a run, with its unit and what it does. Recipes change a few of them.

A config is the whole run: it is printed, kept beside the checkpoints and compared at
resume.
"""

from __future__ import annotations

from ml_collections import ConfigDict


def default_config() -> ConfigDict:
  """The fields of a run. Recipes in `configs/` start from it."""
  config = ConfigDict()
  config.name = "run"  # a run without --workdir lives in runs/<name>
  config.seed = 0  # initial weights, order of records, random draws
  config.steps = 0  # optimizer steps; 0: take config.epochs instead
  config.epochs = 1.0  # passes over the training records, where steps is 0
  config.batch_size = 256  # global pairs a step: every pair is every other's negative
  # The towers see each device's pairs in so many parts; the loss and its gradient are
  # those of the whole batch (GradCache). Less memory for one more forward pass.
  config.microbatches = 1
  # A step's pairs are cut into so many parts whose gradients are averaged: a pair's
  # negatives are those of its part alone. Another loss, unlike microbatches; a step is one
  # update all the same.
  config.accumulate_steps = 1

  # Keep a moving average of the trained parameters, with this decay (0.999 is usual) or,
  # early in the run, less. It is what is evaluated and exported. 0: none.
  config.ema_decay = 0.0

  config.init = ConfigDict()
  config.init.pretrained = ""  # folder, hub id or workdir; "" starts from scratch
  # Where pretrained is a text encoder (BGE, MiniLM), of which a VISTA begins: an EVA-CLIP
  # file. "": a tower from scratch, of the sizes in model.hf.vision_config.
  config.init.image_tower = ""
  # From scratch: cut the first weights out of this larger CLIP (folder, hub id or
  # workdir): first channels and heads, blocks evenly. "": random weights.
  config.init.inherit = ""
  # From scratch: a factor on the vision tower's first position embeddings. transformers
  # draws them at 0.02, far below the patches: a short run learns no places from that.
  config.init.vision_positions = 1.0

  config.model = ConfigDict()  # name, hf and image_size: used from scratch only
  config.model.name = ""  # a named shape, such as TinyCLIP-ViT-40M-32-Text-19M
  config.model.hf = (
    ConfigDict()
  )  # fields of a Hugging Face CLIP config, over the name's
  config.model.image_size = 0  # pixels a side, over the name's; 0: the shape's own
  config.model.dtype = "float32"  # compute: float32 or bfloat16 (parameters: float32)
  # What the backward pass computes again: none, pointwise (norms, activations, softmax:
  # half the memory, and faster), dots (attention too) or full; two with a comma between
  # are the image tower's and the text tower's.
  config.model.remat = "pointwise"
  # Of every picture's patches, at random, while training: less work a step, and a little
  # less accuracy. Evaluation sees them all. 0: none.
  config.model.patch_dropout = 0.0

  config.tokenizer = ConfigDict()  # from scratch, or for weights that come without one
  # A folder, hub id or file with CLIP's vocabulary. "": the one of init.inherit or
  # distill.teacher, or else
  config.tokenizer.path = ""
  config.tokenizer.vocab_size = 8192  # a byte-pair vocabulary of our own captions

  config.fusion = ConfigDict()
  config.fusion.of = "raw"  # raw: add projected vectors (UniIR, the paper); unit
  config.fusion.image_weight = 1.0
  config.fusion.text_weight = 1.0
  config.fusion.learned = False  # train the two weights
  config.fusion.as_bank = False  # hand the loss the fused rows, not their mix

  config.loss = ConfigDict()
  config.loss.name = "gcl"  # gcl, or contrastive (CLIP's loss)
  config.loss.denominator = "self_masked"  # literal, clean, cross_only, target_only
  config.loss.direction_weights = ()  # 3x3 over (image, text, fused); () is all ones
  config.loss.intra_modal_separation = 0.0  # weight of AlignCLIP's separation term
  config.loss.separation_features = "none"  # none, initial_text_tower, or a .npy file
  config.loss.form = "auto"  # streaming or ring; dense holds all logits at once
  config.loss.kernel = "xla"  # pallas: tiles as kernels, for NVIDIA GPUs

  # Learn a frozen teacher's affinities too (TinyCLIP): the cross entropy of the softmaxes
  # over the batch, times weight, beside the loss above times loss_weight.
  config.distill = ConfigDict()
  config.distill.teacher = ""  # folder, hub id or workdir; "": none
  config.distill.weight = 1.0
  config.distill.loss_weight = 1.0  # 0, with image and text alone, is TinyCLIP's recipe
  config.distill.logit_scale = 0.0  # the teacher's; 0: its own
  config.distill.direction_weights = ()  # as of the loss; () is all ones

  config.temperature = ConfigDict()
  config.temperature.mode = "learned"  # learned, or fixed
  config.temperature.logit_scale = (
    0.0  # where it starts or is fixed; 0: the model's own
  )
  config.temperature.max_logit_scale = 100.0  # cap when learned; 0: none

  config.optimizer = ConfigDict()
  config.optimizer.name = "adamw"  # lion, adafactor, lamb or muon: see update_rules
  config.optimizer.learning_rate = 1e-5  # peak
  # Muon moves the blocks' matrices; all else is AdamW's, with this peak (0: the same).
  config.optimizer.adamw_learning_rate = 0.0
  config.optimizer.warmup_steps = 0  # linear, from 0
  config.optimizer.schedule = "cosine"  # cosine or constant, after the warm-up
  config.optimizer.final_fraction = 0.0  # of the peak, at the end of the cosine
  config.optimizer.b1 = 0.9  # momentum; 0 for Adafactor: none, and hardly any state
  config.optimizer.b2 = 0.98  # for Adafactor: the most its decay grows to
  config.optimizer.eps = 1e-6  # AdamW and LAMB
  config.optimizer.muon_momentum = 0.95
  # float32, or bfloat16 for the first moment (momentum). The second stays float32: with
  # b2 near 1 a step changes it by less than bfloat16 can hold.
  config.optimizer.moment_dtype = "float32"
  config.optimizer.weight_decay = 0.2  # kernels, embeddings and LoRA's factors only
  config.optimizer.clip_norm = 1.0  # global norm of the gradient; 0: no clipping
  # First match wins: (pattern of the whole path, factor on the learning rate). A factor
  # of 0 freezes: (("text.*", 0.0),) trains all but the text tower and its projection.
  config.optimizer.multipliers = ()
  # A further factor: this to the power of the blocks above, so that what is near the
  # input learns slowest (0.65 to 0.9 is usual). 1: off.
  config.optimizer.layer_decay = 1.0
  # image or text: that tower and its projection keep their bits. image is LiT.
  config.optimizer.locked_tower = ""

  config.lora = ConfigDict()
  # Train matrices of this rank beside those of the blocks, which are frozen with all
  # else in the towers and the projections. 0: off, train all.
  config.lora.rank = 0
  config.lora.alpha = 16.0  # what is added is alpha / rank times their product
  config.lora.image = ("query", "key", "value", "out", "mlp")  # of the image tower
  config.lora.text = ("query", "key", "value", "out", "mlp")  # (): none of this tower

  config.data = ConfigDict()
  # table, webdataset, parquet, huggingface, packed (by gcl_jax.data.pack), tfds, scenes
  config.data.source = "table"
  # A folder, here or gs://; of tars or Parquet also a file or a pattern {000..012}, *.
  config.data.path = ""
  config.data.table = ""  # its file; "": captions.jsonl or the only table there
  config.data.image_column = "image"
  config.data.caption_column = "captions"
  config.data.group_column = "group"
  config.data.id_column = "id"
  config.data.image_root = ""  # images live in this folder below the path
  config.data.cache_dir = ""  # of indexes and copies; "": ~/.cache/gcl_jax
  config.data.tfds_name = ""
  config.data.tfds_data_dir = ""
  config.data.scenes_train_size = 10_000
  config.data.scenes_image_size = 64
  config.data.scenes_seed = 0
  config.data.train_split = "train"
  config.data.eval_split = "eval"  # test, else dev, else a part split off by hash
  config.data.eval_fraction = 0.1
  config.data.augment = "none"  # none, crop, flip, crop_flip
  config.data.crop_scale = (0.5, 1.0)  # area of a random crop, as a part of the picture
  config.data.text_buckets = (16, 24, 32, 48, 77)  # token lengths a batch is cut to
  config.data.max_bad_fraction = 0.01  # of the records seen; above it the run stops
  config.data.threads = 4  # that read and decode
  config.data.prefetch = 4  # batches read ahead

  config.eval = ConfigDict()
  config.eval.every = 0  # steps; 0: before and after only
  config.eval.before = True  # also evaluate the start
  config.eval.max_items = 0  # at most so many items; 0: all
  config.eval.batch_size = 64
  config.eval.best = (
    "plain.global.other.R@10"  # keep-best watches it (higher is better)
  )

  config.checkpoint = ConfigDict()
  config.checkpoint.every = 500  # steps; the last step is always kept
  config.checkpoint.keep_last = 2
  config.checkpoint.keep_best = 1

  config.log = ConfigDict()
  config.log.every = 10  # steps
  config.log.tensorboard = True
  config.log.wandb = ""  # a Weights & Biases project; "": none
  config.log.profile_start = 0  # first step of a profiler trace; 0: none
  config.log.profile_steps = 3

  config.mesh = ConfigDict()  # devices along each axis; -1: the rest
  config.mesh.data = -1
  config.mesh.fsdp = 1
  config.mesh.tensor = 1
  return config


# What may change between a run and its continuation: it moves no training result but
# the length, which moves the schedule and is what the user then asked for.
MAY_CHANGE = (
  "name",
  "steps",
  "epochs",
  "microbatches",
  "model.remat",
  "data.path",
  "data.cache_dir",
  "data.threads",
  "data.prefetch",
  "data.max_bad_fraction",
  "eval",
  "checkpoint",
  "log",
  "mesh",
)
