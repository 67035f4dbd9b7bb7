"""What `sigma-book bench` found, as tables and figures."""

__all__ = ["bench_lines", "draw_bench", "draw_growth", "growth_lines"]


def _megabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:,.0f}"


def _milliseconds(values: dict | None) -> str:
    return "-" if values is None else " / ".join(f"{1e3 * values[key]:,.1f}" for key in ("min", "median", "p95"))


def bench_lines(found: dict) -> list[str]:
    """What `bench` found, as a table for people."""
    facts, work = found["machine"], found["work"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
    peak, title = ("gpu_peak", "GPU MB") if work["device"].startswith("cuda") else ("peak_resident", "peak MB")
    processor = facts["cpu"] if work["device"] == "cpu" else facts["gpu"] or work["device"]
    lines = [
        f"{processor}, {facts['cores']} cores, {facts['threads']} threads; {versions}; {facts['date']}",
        f"{work['folder']}: {work['quantize'] or work['dtype']}{', compiled' * work['compile']}, batch {work['batch']}, "
        f"{work['prompt_length']} prompt tokens, {work['new_tokens']} new; {work['repeat']} turns after {work['warmup']}",
        "",
        f"{'':14}{'first token, ms':>28}{'next token, ms':>28}{'tokens/s':>10}{title:>10}{'own':>8}{'mapped':>8}",
        f"{'':14}{'min / median / p95':>28}{'min / median / p95':>28}",
    ]
    for name, one in found["contenders"].items():
        megabytes = [_megabytes(one["memory"][key]) for key in (peak, "anonymous", "file_mapped")]
        speed = one["tokens_per_second"]
        lines.append(
            f"{name:14}{_milliseconds(one['first_token']):>28}{_milliseconds(one['next_token']):>28}"
            f"{'-' if speed is None else f'{speed:.1f}':>10}{megabytes[0]:>10}{megabytes[1]:>8}{megabytes[2]:>8}"
        )
    for name, one in found["contenders"].items():
        then = one["load"]["loaded"]
        lines.append(
            f"{name} loaded in {one['load']['load_seconds']:.1f} s: at most {_megabytes(then[peak])} MB, in the end "
            f"{_megabytes(then['anonymous'])} MB of its own"
        )
    if "ratios" in found:
        ratios = ", ".join(f"{name.replace('_', ' ')} {ratio:.2f}" for name, ratio in found["ratios"].items())
        lines += ["", f"sigma_book / transformers: {ratios}; same tokens: {'yes' if found['tokens_equal'] else 'no'}"]
    if "bill" in found:
        limits = found["limits"]
        how = "measured" if limits["measured"] else "computed from published peaks, not measured"
        if limits["measured"] and not limits["rates"]:
            how += " in float32: a product of other numbers may be far slower"
        lines += ["", f"limits ({how}): {limits['peak'] / 1e9:,.0f} GFLOP/s, {limits['read'] / 1e9:,.1f} GB/s"]
        held = ", ".join(f"{name} {size / 1e6:,.1f}" for name, size in found["held"].items())
        lines.append(f"held, computed, MB: {held}")
        lines.append(f"{'part':14}{'GFLOP':>10}{'MB moved':>10}{'predicted ms':>14}{'measured ms':>14}{'ratio':>8}")
        for row in found["bill"]:
            measured = "-" if row["measured"] is None else f"{row['measured'] * 1e3:,.1f}"
            ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}"
            lines.append(
                f"{row['part']:14}{row['flops'] / 1e9:>10,.1f}{row['bytes'] / 1e6:>10,.1f}"
                f"{row['predicted'] * 1e3:>14,.1f}{measured:>14}{ratio:>8}"
            )
    return lines


def growth_lines(found: dict) -> list[str]:
    """What `growth` found, as a table for people."""
    lines = [f"size {found['size']}, float32; {found['machine']['cpu']}; {found['machine']['date']}"]
    for kind in ("pixels", "pictures", "tokens"):
        lines.append(f"{kind:10}{'predicted s':>14}{'measured s':>14}{'ratio':>8}")
        for point in found[kind]:
            seen = point["measured"]
            measured, ratio = ("-", "-") if seen is None else (f"{seen:.2f}", f"{seen / point['predicted']:.2f}")
            lines.append(f"{point['value']:<10}{point['predicted']:>14.2f}{measured:>14}{ratio:>8}")
    return lines


def draw_bench(found: dict):
    """A figure: each contender's first and next token, and what was predicted."""
    import matplotlib.pyplot as plt

    from sigma_book.style import ANSWER, GREY, PICTURE, use_style

    use_style()
    names = list(found["contenders"])
    figure, axes = plt.subplots(1, 2, figsize=(8, 0.9 + 0.6 * len(names)), sharey=True)
    predicted = {row["part"]: row["predicted"] for row in found.get("bill", [])}
    for axis, key, part in zip(axes, ("first_token", "next_token"), ("first token", "next token")):
        for place, name in enumerate(reversed(names)):
            values = found["contenders"][name][key]
            if values is None:
                continue
            axis.barh(place, 1e3 * values["median"], color=PICTURE if name == "sigma_book" else GREY, height=0.55)
            axis.plot([1e3 * values["min"], 1e3 * values["p95"]], [place, place], color="black", lw=1)
            axis.text(1e3 * values["p95"], place, f"  {1e3 * values['median']:,.1f}", va="center", fontsize=9)
        if part in predicted:
            axis.axvline(1e3 * predicted[part], color=ANSWER, lw=1.5, ls="--")
            axis.text(1e3 * predicted[part], len(names) - 0.45, " predicted", color=ANSWER, fontsize=8)
        axis.set(title=f"{part}, ms", xlim=(0, axis.get_xlim()[1] * 1.2), ylim=(-0.5, len(names) - 0.25))
    axes[0].set_yticks(range(len(names)), list(reversed(names)))
    return figure


def draw_growth(found: dict):
    """A figure with three panels: predicted lines, measured points."""
    import matplotlib.pyplot as plt

    from sigma_book.style import ANSWER, PICTURE, use_style

    use_style()
    figure, axes = plt.subplots(1, 3, figsize=(9, 3), sharey=True)
    for axis, kind in zip(axes, ("pixels", "pictures", "tokens")):
        values = [point["value"] for point in found[kind]]
        axis.plot(values, [point["predicted"] for point in found[kind]], color=PICTURE, label="predicted")
        seen = [(point["value"], point["measured"]) for point in found[kind] if point["measured"] is not None]
        axis.plot([value for value, _ in seen], [seconds for _, seconds in seen], "o", color=ANSWER, label="measured")
        axis.set(xscale="log", yscale="log", xticks=values, xticklabels=values)
        axis.set_xlabel({"pixels": "side in pixels", "pictures": "pictures at once", "tokens": "new tokens"}[kind])
        axis.minorticks_off()
    axes[0].set_ylabel("seconds")
    axes[0].legend(frameon=False)
    return figure
