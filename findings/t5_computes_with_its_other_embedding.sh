#!/usr/bin/env bash
# A T5 file with both names of the embedding: `get_input_embeddings()` gives one matrix, the encoder computes with the other.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.24.0 torch==2.13.0 safetensors==0.8.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'EOF'
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5EncoderModel

print("transformers", transformers.__version__)
torch.manual_seed(0)
sizes = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2}
T5EncoderModel(T5Config(**sizes, feed_forward_proj="gated-gelu", tie_word_embeddings=True)).save_pretrained("t5")
tensors = load_file("t5/model.safetensors")
ids = torch.tensor([[3, 4, 5]])
before = T5EncoderModel.from_pretrained("t5")(ids).last_hidden_state.detach()
# A tool trained the matrix under the first name, and left the second as it was.
tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].clone()
tensors["shared.weight"] = tensors["shared.weight"] + 1
save_file(tensors, "t5/model.safetensors", {"format": "pt"})
model = T5EncoderModel.from_pretrained("t5")
told = torch.equal(model.get_input_embeddings().weight, tensors["shared.weight"])
unchanged = torch.equal(model(ids).last_hidden_state, before)
print("expected: one matrix, since the configuration says tie_word_embeddings")
print(f"seen: get_input_embeddings() is shared.weight: {told}; the encoder computes as before it was changed: {unchanged}")
assert told and unchanged
EOF
