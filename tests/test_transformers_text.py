"""modeling/transformers_text.py: towers of T5, CLIP and SigLIP made here; padding says nothing."""

import pickle
import re
import sys

import pytest
import torch
from conftest import TINY_CLIP
from tiny_experiment import Experiment, draw
from PIL import Image
from torch.nn import functional as F

from modeling.clip_weights import AbsentWeights, build_clip
from modeling.flow import FlowConfig
from modeling.flow_model import build_flow, fill_in_sizes
from modeling.flowtok import FlowTokConfig
from modeling.image_tokenizer import ImageTokenizer, ImageTokenizerConfig, TransformerSize
from modeling.text_encoder import ClipTextEncoder, TextEncoderConfig, load_text_encoder
from modeling.text_projector import TextProjectorConfig
from modeling.transformers_text import build_tower
from training.tokens import projector_sizes

transformers = pytest.importorskip("transformers", reason="requirements-text.txt")

WORDS = "a the red green blue black circle square triangle".split()
SPECIAL = ["<pad>", "</s>", "<unk>"]
CAPTIONS = ["a red circle", "the green square", ""]
LENGTH, WIDTH = 12, 16
SETTINGS = {
    "t5": transformers.T5Config(
        vocab_size=16, d_model=WIDTH, d_kv=8, d_ff=16, num_layers=2, num_heads=2,
    ),
}
