#!/bin/sh
# Siamese DETR (Chen et al., CVPR 2023) with Conditional DETR with 100 queries, on ImageNet:
# ablation without region and global discrimination.
# Published: 32 GPUs x 8 images (batch 256), 300k steps, lr drop after 200k.
# EdgeBoxes runs during training, on image gradients.
# As published: --edge_model model.yml.gz. Faster: --cache_path, see docs/proposals.md.
set -eu
cd "$(dirname "$0")/.."
exec ${LAUNCH:-python} main.py \
    --pretext siamese --detector conditional_detr --num_queries 100 --max_iters 300000 --lr_drop_iters 200000 --batch_size 8 \
    --feature_loss_coef 0 --global_loss_coef 0 --imagenet_path data/ilsvrc/train \
    --output_dir exps/r50_condtr_100q_imgnet_edgebox_gpu32_step30w "$@"
