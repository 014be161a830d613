"""What the files and tensors of a Wan transformer are called elsewhere: tables, and their readers.

Tables from how something looks to what it is. Nothing here opens a file.
"""

import re

DIFFUSERS_NAMES = {
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "self_attn": "attn1", "cross_attn": "attn2",
    "q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0",
    "norm2": "norm3", "norm3": "norm2",  # Diffusers numbers them in order of use
    "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2",
    "head.head": "proj_out", "head.modulation": "scale_shift_table",
    "modulation": "scale_shift_table",
}
DIFFUSERS_SETTINGS = {
    "in_dim": "in_channels", "out_dim": "out_channels", "num_heads": "num_attention_heads",
    **{name: name for name in ("ffn_dim", "num_layers", "text_dim", "freq_dim", "patch_size",
                               "eps")}}

# What trainers, compilers and other programs wrap a model in.
WRAPPERS = re.compile(
    r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|module)\.")
PREFIXES = re.compile(
    r"((state_dict|base_model|model|diffusion_model|transformer|pipe|dit|net|generator|student)\."
    r"|lora_(unet|transformer)_+)*")
AVERAGES = "generator_ema", "ema_model", "model_ema", "ema"  # over a training's steps
TRAINED_BESIDE = re.compile(r"[^.]*(optim|sched|critic|fake_score|real_score|discriminator)")

# How a LoRA's key ends after the layer's name, what it holds, and for which of the layer's
# parameters. The name of an adapter may stand before `.weight`.
LORA_KEYS = (
    (r"\.lora(_A|_down|\.down)(\.[^.]+)?\.weight", "down", ".weight"),
    (r"\.lora(_B|_up|\.up)(\.[^.]+)?\.weight", "up", ".weight"),
    (r"\.lora_B(\.[^.]+)?\.bias", "up_bias", ".bias"),
    (r"\.alpha", "alpha", ".weight"),
    (r"\.(diff|w_norm)", "diff", ".weight"),
    (r"\.(diff_b|b_norm)", "diff_b", ".bias"),
    (r"\.diff_m", "diff_m", ".modulation"),
)

ONLY = "only Wan2.1's text-to-video models are supported"
TWO_EXPERTS = f"one of the two experts of a Wan2.2 model, which takes both; {ONLY}"
AGAIN = "download or copy it again"
QUANTISED = "quantised weights, which are not read; take the file in bfloat16 or float16"
A_LORA = "a LoRA and not a model; give its base with --model, and this file with --lora"
A_MODEL = "a whole model and not a LoRA; give it with --model"
BLANK = f"filled with zeros, as by an unfinished download; {AGAIN}"
FIRST_BYTES = (  # of a file that is neither safetensors nor of torch.save
    (rb"\Z", f"empty; {AGAIN}"),
    (rb"\0{8}", BLANK),
    (rb"version https://git-lfs",
     "a pointer of git-lfs, not the weights; run git lfs pull, or hf download"),
    (rb"GGUF", f"GGUF, {QUANTISED}"),
    (rb"\s*<", f"a web page, not the weights; {AGAIN}"),
)
OTHER_KINDS = (  # what one tensor's name says about its file
    (r"scale_weight|weight_scale|scaled_fp8|scale_input|input_scale|comfy_quant|qweight|qzeros|"
     r"absmax|quant_(map|state)|\.SCB$", QUANTISED),
    (r"\.lokr_", "a LoKr; of adapters, only LoRA is supported"),
    (r"\.hada_", "a LoHa; of adapters, only LoRA is supported"),
    (r"\.dora_scale|lora_magnitude", "a DoRA; of adapters, only LoRA is supported"),
    (r"\.oft_|\.boft_|\.vera_|\.glora|\.ia3_|\.lora_mid|set_weight|reshape_weight",
     "another kind of adapter; only LoRA is supported"),
    (r"k_img|v_img|img_emb|add_[kvq]_proj|norm_added|image_embedder",
     f"for image-to-video; {ONLY}"),
    (r"vace_", f"for Wan-VACE; {ONLY}"),
    (r"face_adapter|face_encoder|motion_encoder|pose_patch", f"for Wan-Animate; {ONLY}"),
    (r"audio|cond_mask|frame_packer", f"for Wan's speech-to-video; {ONLY}"),
    (r"control_adapter|ref_conv|recammaster|cam_encoder", f"for video control; {ONLY}"),
    (r"transformer_2\.|(high|low)_noise", TWO_EXPERTS),
    (r"^(lora_te|text_encoder)", "also for a text encoder; only the transformer's are supported"),
)
OTHER_PARTS = (  # the same, where a model is wanted
    (r"[._]lora[._]|\.diff(_[bm])?$", A_LORA),
    (r"(^|\.)(token_embedding|shared|embed_tokens)\.weight", "a text encoder, not a transformer"),
    (r"(^|\.)(en|de)coder\.(conv1|conv_in|conv_out|middle|mid_block|downsamples|upsamples)\.",
     "a VAE, not a transformer"),
    (r"^enter\.0\.", "a frame interpolator, not a transformer"),
)
EXPERTS = "transformer_2", "high_noise_model", "low_noise_model"  # folders
FILE_NAMES = (  # what only the name of a file says, as its tensors are those of Wan2.1
    (r"(?i)(high|low)[-_ ]?noise", TWO_EXPERTS),
    (r"(?i)wan[-_ ]?2[._-]?2(?!\d)", f"for Wan2.2 by its name; {ONLY}"),
)
CHANNELS = {36: "image-to-video", 48: "Wan2.2-TI2V-5B, or video control"}  # a transformer takes


def rename(name, table):
    """Replace the dotted parts of a name that are keys of the table, all in one pass."""
    parts = "|".join(map(re.escape, table))
    return re.sub(rf"(?<![^.])({parts})(?![^.])", lambda match: table[match[0]], name)


def diffusers_name(name):
    """Diffusers' name of a tensor, given the original one."""
    return rename(name, DIFFUSERS_NAMES)


def unwrap(name):
    """A tensor's name without what other programs put before and between its parts."""
    name = WRAPPERS.sub("", name)
    return name[PREFIXES.match(name).end():]


def explain(names, table):
    """What the first row of a table that fits one of these names says, and that name; or None."""
    return next((f"{what} ({name})" for pattern, what in table for name in names
                 if re.search(pattern, name)), None)
