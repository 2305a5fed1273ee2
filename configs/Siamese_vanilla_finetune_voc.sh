#!/bin/sh
# Siamese DETR (Chen et al., CVPR 2023) on DETR, post-norm, fine-tuned on PASCAL VOC.
# Published: AP 57.4; settings not published. Here: 150 epochs, lr drop after 100.
# Trained on VOC 2012 trainval, evaluated on VOC 2007 test with COCO metrics, `difficult` objects included.
set -eu
cd "$(dirname "$0")/.."
exec ${LAUNCH:-python} finetune_main.py \
    --epochs 150 --lr_drop 100 --lr_backbone 5e-5 --dataset_file voc_coco \
    --pretrain exps/r50_vanillatr_syncbn_imgnet_edgebox_rdiscr_gdiscr_gpu32_step30w/checkpoint.pth \
    --output_dir exps/Siamese_vanilla_finetune_voc "$@"
