#!/bin/sh
# Siamese DETR (Chen et al., CVPR 2023) with DETR, post-norm, with 100 queries, on ImageNet.
# Published: 32 GPUs x 8 images (batch 256), 300k steps, lr drop after 200k.
# No AP of its own; see Siamese_vanilla_finetune_coco and Siamese_vanilla_finetune_voc.
# EdgeBoxes runs during training, on image gradients.
# As published: --edge_model model.yml.gz. Faster: --cache_path, see docs/proposals.md.
set -eu
cd "$(dirname "$0")/.."
exec ${LAUNCH:-python} main.py \
    --pretext siamese --detector detr --max_iters 300000 --lr_drop_iters 200000 --batch_size 8 \
    --feature_loss_coef 3 --global_loss_coef 10 --imagenet_path data/ilsvrc/train \
    --output_dir exps/r50_vanillatr_syncbn_imgnet_edgebox_rdiscr_gdiscr_gpu32_step30w "$@"
