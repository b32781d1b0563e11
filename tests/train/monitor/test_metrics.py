from dinov2_toolkit.train.monitor.metrics import progress_note


def test_the_progress_line_shows_every_figure_of_health() -> None:
    figures = {
        "step": 1200,
        "samples": 76_800,
        "epoch": 1.28,
        "total": 5.125,
        "ibot": 4.0,
        "koleo": -0.5,
        "ibot_weighted": 4.0,
        "koleo_weighted": -0.05,
        "lr": 0.00125,
        "grad_norm_backbone": 1.234,
        "grad_norm_dino_head": 0.5,
        "teacher_entropy": 2.5,
        "teacher_kl_to_uniform": 1.5,
        "prototype_perplexity": 101.0,
        "rank_me": 33.33,
        "images_per_s": 210.0,
        "data_wait": 0.02,
        "peak_memory_mib": 812.0,
        "knn": 0.815,
    }
    assert progress_note(figures) == (
        "loss 5.125, k-NN 0.815, step 1,200, epoch 1.28, images 76,800, lr 1.25e-03, 210 images/s, data wait 2%, "
        "memory 812 MiB, entropy 2.50, KL to uniform 1.50, prototypes 101, RankMe 33.3, ibot 4.000 (4.000), "
        "koleo -0.500 (-0.050), gradients backbone 1.2 dino_head 0.5"
    )
    assert progress_note({}) == ""
