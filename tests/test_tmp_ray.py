def test_a(ray_local, golden):
    def f():
        import os, platform, sys, deepgen, torchvision, transformers
        return platform.__file__, deepgen.__file__, os.environ.get("DS_ACCELERATOR"), sys.modules.get("torchaudio", 1)
    print(ray_local.get(ray_local.remote(f).remote(), timeout=120), len(golden))
