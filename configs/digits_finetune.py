"""Fine-tuning with few images: a small MLP-Mixer from MNIST to scikit-learn's digits.

Paper: Chen et al., When Vision Transformers Outperform ResNets, arXiv:2106.01548, section 5.5: what
SAM trained is fine-tuned by plain SGD; and Foret et al., SAM, arXiv:2010.01412, section 3.2:
fine-tuning by SAM. Here at a small scale: 4000 of MNIST's images, then 50 images of 8×8 pixels
resized to MNIST's 28×28, with the same ten classes, so that the head is kept. All settings are
chosen here, and none was swept.

Command: curvax train digits_finetune:mnist
         curvax compare digits_finetune --seeds 3 --init_from=runs/FOLDER/1-sam_perturb-adamw
         (FOLDER is the run folder of the first command, and 0-adamw in it holds AdamW's weights;
         without --init_from training starts from random weights)

Expected: on MNIST, with one seed, AdamW classifies 92.4 % of the test images correctly and SAM
93.4 %, largest Hessian eigenvalue 15.4 against 4.3. Over three seeds of the 50 digits SGD reaches
67.9 ± 1.8 % from random weights, 75.7 ± 4.8 % from AdamW's weights and 80.3 ± 3.9 % from SAM's,
each seed in that order; SAM in fine-tuning 67.5 ± 2.9, 77.4 ± 6.1 and 80.9 ± 5.3 %, within a
standard deviation of SGD.

Cost: the first took five minutes on two overloaded CPU cores and half of that in CPU time, each
run of the second half a minute.
"""

from ml_collections import ConfigDict

from curvax.training.config import defaults


def get_config(stage: str = "few") -> ConfigDict:
    """`mnist` trains the weights, `few` fine-tunes them."""
    config = defaults(lr=3e-3, rho=0.1)
    config.model.name = "mixer_tiny"
    config.model.options.update(depth=2, scan=False, patch=4)
    config.data.update(mean=(0.5,), std=(0.5,))  # the same for both
    if stage == "mnist":
        config.data.name = "mnist"
        config.baseline = "adamw(cosine(lr))"
        config.update(train_baselines=True, epochs=10, hessian_examples=256)
    else:
        config.data.update(name="digits", num_train=50, image_size=28)
        config.baseline = "sgd(cosine(0.03), momentum=0.9)"
        config.update(batch=25, epochs=50, test_every=10, hessian_examples=0)
    config.optimizer = f"sam_perturb(rho) | {config.baseline}"
    return config
