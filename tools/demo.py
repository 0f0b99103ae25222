"""The main job on a real photograph: noise added to astronaut() of scikit-image is removed by `vicus denoise`.

Writes noisy.png, denoised.png and demo.png (noisy | denoised | clean), and prints how good and how fast that was,
next to scikit-image's own denoise_nl_means(fast_mode=False) with the same input and parameters.

    .venv/bin/python tools/demo.py build/src/cli/vicus out
"""

import argparse
import json
import os
import pathlib
import subprocess
import tempfile
import time

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from skimage import data
from skimage.metrics import peak_signal_noise_ratio
from skimage.restoration import denoise_nl_means

SEED = 2024
SIGMA = 20.0  # on the scale 0..255
WINDOW, PATCH = 21, 7
CROP = (slice(0, 256), slice(96, 352))  # the face: scikit-image takes several seconds for it
FIGURE = (slice(10, 222), slice(120, 332))


def denoise(vicus, source, target, sigma, *extra):
    """Runs `vicus denoise`; returns its report and the seconds of the whole process."""
    filtering = ["--window", WINDOW, "--patch", PATCH, "--sigma", sigma]
    command = [vicus, "denoise", source, "-o", target, *filtering, "--json", *extra]
    start = time.perf_counter()
    done = subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True)
    return json.loads(done.stdout), time.perf_counter() - start


def psnr(clean, picture):
    return peak_signal_noise_ratio(clean, picture, data_range=255)


def compare(vicus, noisy, clean):
    """Both programs on floats of the crop, so that no rounding to 8 bits hides a difference."""
    noisy, clean = noisy[CROP].astype(np.float32), clean[CROP].astype(np.float64)
    with tempfile.TemporaryDirectory() as folder:
        source, target = f"{folder}/noisy.npy", f"{folder}/denoised.npy"
        np.save(source, noisy)
        seconds = {}
        for threads in (1, 2):
            runs = [denoise(vicus, source, target, SIGMA, "--channels-last", "--threads", threads)[1] for _ in range(3)]
            seconds[threads] = min(runs)
        ours = np.load(target)
    start = time.perf_counter()
    theirs = denoise_nl_means(
        noisy.astype(np.float64),
        patch_size=PATCH,
        patch_distance=WINDOW // 2,
        h=SIGMA,
        fast_mode=False,
        preserve_range=True,
        channel_axis=-1,
    )
    their_seconds = time.perf_counter() - start
    difference = np.abs(ours - theirs)

    height, width = noisy.shape[:2]
    print(f"\nThe crop of {width}x{height}, floats in and out; seconds of vicus are of the whole process, best of 3")
    print(f"  {'':34}{'PSNR':>9}{'seconds':>10}{'speed':>9}")
    print(f"  {'noisy':34}{psnr(clean, noisy):6.2f} dB")
    name = "scikit-image, fast_mode=False"
    print(f"  {name:34}{psnr(clean, theirs):6.2f} dB{their_seconds:10.2f}{1:8.1f}x")
    for threads, ours_seconds in seconds.items():
        name = f"vicus denoise, {threads} thread{'s' if threads > 1 else ''}"
        print(f"  {name:34}{psnr(clean, ours):6.2f} dB{ours_seconds:10.2f}{their_seconds / ours_seconds:8.1f}x")
    print(f"  difference of the two: max {difference.max():.3f}, mean {difference.mean():.4f} of 255")
    print("  (scikit-image cuts distances off at 5 and approximates exp; see docs/denoise.md)")


def side_by_side(pictures, path):
    """Pictures of one size in a row, each under its label."""
    margin, header = 6, 30
    height, width = pictures[0][1].shape[:2]
    sheet = Image.new("RGB", (len(pictures) * (width + margin) - margin, height + header), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=18)
    for i, (label, picture) in enumerate(pictures):
        left = i * (width + margin)
        draw.text((left + width / 2, header / 2), label, fill="black", font=font, anchor="mm")
        sheet.paste(Image.fromarray(picture), (left, header))
    sheet.save(path, optimize=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    program = os.environ.get("VICUS_CLI", "build/src/cli/vicus")
    parser.add_argument("vicus", nargs="?", default=program, help=f"path of the program [{program}]")
    parser.add_argument("folder", nargs="?", default="out", type=pathlib.Path, help="where the pictures go [out]")
    parser.add_argument("--figure", type=pathlib.Path, help="also write the face side by side, as the README shows it")
    arguments = parser.parse_args()
    vicus = os.path.abspath(arguments.vicus)
    arguments.folder.mkdir(parents=True, exist_ok=True)

    clean = data.astronaut()
    noise = np.random.default_rng(SEED).normal(scale=SIGMA, size=clean.shape)
    noisy = np.clip(np.rint(clean + noise), 0, 255).astype(np.uint8)
    noisy_path, denoised_path = arguments.folder / "noisy.png", arguments.folder / "denoised.png"
    Image.fromarray(noisy).save(noisy_path)
    report, seconds = denoise(vicus, noisy_path, denoised_path, SIGMA)
    denoised = np.asarray(Image.open(denoised_path))
    run = report["runs"][0]

    print(f"astronaut() {clean.shape[1]}x{clean.shape[0]} in colour, noise of standard deviation {SIGMA:g} of 255")
    print(f"vicus denoise --window {WINDOW} --patch {PATCH} --sigma {SIGMA:g}")
    print(f"  PSNR {psnr(clean, noisy):.2f} dB -> {psnr(clean, denoised):.2f} dB in {seconds:.2f} s, PNG to PNG")
    print(f"  attention took {run['attention_seconds']:.2f} s on {run['threads']} threads in {run['dtype']}:", end=" ")
    print(f"{run['gflop_per_second']:.0f} GFLOP/s of useful work, work ratio {run['work_ratio']:.2f}")
    compare(vicus, noisy, clean)

    sheet = arguments.folder / "demo.png"
    labels = (f"noisy, {psnr(clean, noisy):.1f} dB", f"vicus denoise, {psnr(clean, denoised):.1f} dB", "clean")
    pictures = (noisy, denoised, clean)
    side_by_side(list(zip(labels, pictures, strict=True)), sheet)
    if arguments.figure:
        labels = ("noisy", "vicus denoise", "clean")
        side_by_side(
            [(label, picture[FIGURE]) for label, picture in zip(labels, pictures, strict=True)], arguments.figure
        )
    print(f"\nnoisy | denoised | clean: {sheet}")


if __name__ == "__main__":
    main()
