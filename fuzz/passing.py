"""Operators that let units through, family by family, so that every rule is crossed and not only refused."""

from __future__ import annotations

from fuzz.generate import Builder, Unfit


def pass_through(g: Builder, x: str) -> str:
    """One operator, or a few, that pass some units of x, drawn evenly from the families."""
    if len(g.shape(x)) < 2:
        raise Unfit
    family = g.one_of(
        _reshaped, _reshaped, _turned, _joined, _taken, _pooled, _resized, _padded, _numbers, _turned_around, _parameters, _copied,
        _positive, _averaged, _summed, _made_from_shape, _mixed, _picked, _at_places, _composed,
    )  # fmt: skip
    codes = family(g, x)
    if not codes:
        raise Unfit
    if family in (_padded, _positive, _mixed, _picked, _at_places):
        g.hint = "scale"  # these pass no shift, so let a norm without one meet them
    return str(g.emit(g.one_of(*codes), x))


def _sides(g: Builder, x: str) -> tuple[int, int, int]:
    """Rank, channels, number of spatial axes."""
    shape = g.shape(x)
    return len(shape), shape[1], len(shape) - 2


def _reshaped(g: Builder, x: str) -> list[str]:
    rank, channels, _ = _sides(g, x)
    shape = g.shape(x)
    codes = [
        "$0.flatten(1)", "$0.view($0.shape)", "$0.reshape($0.shape[0], -1)", "$0.unsqueeze(2).squeeze(2)",
        "$0.unsqueeze(1).squeeze(1)", "$0.view_as($0)", "$0.reshape_as($0.clone())", "torch.atleast_3d($0)",
        "$0.unsqueeze(-1).expand(*$0.shape, 2).flatten(-2)", "$0.repeat(1, 2" + ", 1" * (rank - 2) + ")",
        "$0.tile(1, 2" + ", 1" * (rank - 2) + ")", "$0.repeat_interleave(2, 1)", "$0.unsqueeze(1).expand(-1, 3, *$0.shape[1:]).mean(1)",
        "$0.reshape(-1, *$0.shape[1:])", "torch.broadcast_to($0, $0.shape)", "$0.expand_as($0)", "$0.flatten(0, 1).unflatten(0, (-1, $0.shape[1]))",
        "$0.unsqueeze(0).squeeze(0)", "$0.view($0.shape[0], $0.shape[1], -1)", "$0.unsqueeze(0).flatten(0, 1)",
    ]  # fmt: skip
    if channels % 2 == 0:
        codes += [
            "$0.unflatten(1, (2, -1)).flatten(1, 2)",
            "$0.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)",
            "$0.unflatten(1, (2, -1)).transpose(0, 1).flatten(0, 1)",
            "$0.reshape(-1, $0.shape[1] // 2, *$0.shape[2:])",
        ]
    if rank == 4:
        codes += [
            "$0.flatten(2)",
            "$0.flatten(2).transpose(1, 2).transpose(1, 2).reshape($0.shape)",
            "$0.flatten(2).mT",
            "$0.permute(0, 2, 3, 1).flatten(1, 2).flatten(0, 1)",
        ]
        codes += ["F.channel_shuffle($0, 2)", "nn.ChannelShuffle(2)($0)"] * (channels % 2 == 0)
        codes += ["F.pixel_shuffle($0, 2)"] * 2 * (channels % 4 == 0)
        codes += ["F.pixel_unshuffle($0, 2)"] * (shape[2] % 2 == 0 and shape[3] % 2 == 0)
    return codes


def _turned(g: Builder, x: str) -> list[str]:
    rank, _, _ = _sides(g, x)
    if rank == 2:
        return ["$0.t().t()", "$0.mT.mT", "$0.T.T", "$0.transpose(0, 1).t()", "$0[:, None].swapdims(1, 2).squeeze(2)"]
    codes = [
        "$0.transpose(1, 2)",
        "$0.movedim(1, -1).movedim(-1, 1)",
        "$0.swapaxes(1, -1)",
        "$0.swapdims(1, 2)",
        "$0.moveaxis(1, 2)",
        "$0.mT",
        "$0.adjoint()",
        "$0.transpose(0, 1).transpose(0, 1)",
    ]
    if rank == 4:
        codes += [
            "$0.permute(0, 2, 3, 1)",
            "$0.permute(0, 3, 1, 2)",
            "$0.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)",
            "$0.to(memory_format=torch.channels_last)",
            "$0.contiguous(memory_format=torch.channels_last)",
        ]
    return codes


def _joined(g: Builder, x: str) -> list[str]:
    _rank, channels, _ = _sides(g, x)
    codes = [
        "torch.cat([$0, $0], 1)", "torch.concat([$0, $0.flip(1)], dim=1)", "torch.stack([$0, $0], 1).flatten(1, 2)", "torch.stack([$0, $0], 2).mean(2)",
        "torch.cat([$0, torch.zeros_like($0)], 1)", "torch.cat([$0, $0], 0)", "torch.cat([$0, $0.flip(0)]).chunk(2)[0]", "torch.concatenate([$0, $0], -1)",
        "torch.stack($0.unbind(1), 1)", "torch.stack($0.unbind(0))", "torch.cat([$0, torch.sigmoid($0)], 1)", "torch.stack([$0, torch.tanh($0)], -1).flatten(-2)[..., ::2]",
        "torch.hstack([$0, $0])",
    ]  # fmt: skip
    if channels > 1:
        codes += [
            "torch.cat($0.chunk(2, 1)[::-1], 1)",
            "torch.cat(torch.tensor_split($0, 2, 1), 1)",
            "torch.cat([$0[:, 1:], $0[:, :1]], 1)",
            "torch.cat([F.relu($0[:, :1]), $0[:, 1:]], 1)",
            "torch.cat([$0.split(1, 1)[0], torch.tanh($0[:, 1:])], 1)",
        ]
    if channels % 2 == 0:
        codes += [
            "sum($0.chunk(2, 1))",
            "$0.chunk(2, 1)[0] - $0.chunk(2, 1)[1]",
            "F.glu($0, 1)",
            "torch.maximum(*$0.chunk(2, 1))",
            "(lambda a, b: a * b.sigmoid())(*$0.chunk(2, 1))",
            "(lambda a, b: torch.cat([F.relu(a), b], 1))(*$0.chunk(2, 1))",
        ]
    return codes


def _taken(g: Builder, x: str) -> list[str]:
    rank, channels, _ = _sides(g, x)
    order = list(range(channels))
    g.random.shuffle(order)
    codes = [
        f"$0[:, {order}]", f"torch.index_select($0, 1, torch.tensor({order}))", f"$0[:, torch.tensor({order})]", "$0.flip(1)", "$0.roll(1, 1)", "$0.flip(-1)", "$0.roll(1, -1)", "$0.flip(0)", "$0.roll(1, 0)",
        f"$0[:, {order + order[:1]}]", "$0[:, :1]", "$0[:, -1:]", "$0[..., 1:]", "$0[..., ::2]", "$0.narrow(1, 0, 1)", "$0[:, 0].unsqueeze(1)", "$0.select(1, -1)", "$0[..., -1]", "$0.select(-1, 0)",
        "$0[:, ::2]", "$0[:, 1::2]", "$0[:1]", "$0[:, None]", "$0[..., None].squeeze(-1)", f"$0.index_select(1, torch.tensor({order[:1]}))", "torch.index_select($0, 0, torch.arange($0.shape[0]))", "$0[0]", "$0.fliplr()", "$0.take_along_dim(torch.zeros_like($0, dtype=torch.int64), 1)", "torch.gather($0, -1, torch.zeros_like($0, dtype=torch.int64))",
    ]  # fmt: skip
    if rank == 4:
        codes += [
            "torch.cat([$0[..., ::2, ::2], $0[..., 1::2, 1::2]], 1)"
            if min(g.shape(x)[2:]) % 2 == 0
            else "$0[..., 1:, :]",
            "$0.unfold(3, 2, 2).mean(-1)",
            "$0[:, :, 0]",
            "$0.unfold(2, 2, 1)",
            "F.unfold($0, 2)",
        ]
    return codes


def _pooled(g: Builder, x: str) -> list[str]:
    _, _, n = _sides(g, x)
    if n not in (1, 2, 3):
        return ["F.avg_pool1d($0[:, None], 2).squeeze(1)", "F.max_pool1d($0[:, None], 2).squeeze(1)"]
    return [
        f"F.avg_pool{n}d($0, 2)", f"F.avg_pool{n}d($0, 3, 1, 1)", f"F.avg_pool{n}d($0, 3, 1, 1, count_include_pad=False)", f"F.avg_pool{n}d($0, 3, 2, ceil_mode=True)",
        f"F.avg_pool{n}d($0, 3, 2, 1, ceil_mode=True)", f"F.max_pool{n}d($0, 2)", f"F.max_pool{n}d($0, 3, 1, 1)", f"F.max_pool{n}d($0, 3, 2, 1, ceil_mode=True)", f"F.max_pool{n}d($0, 2, return_indices=True)[0]",
        f"F.adaptive_avg_pool{n}d($0, 1)", f"F.adaptive_avg_pool{n}d($0, 2)", f"F.adaptive_max_pool{n}d($0, 2)", f"nn.AdaptiveAvgPool{n}d(3)($0)", f"nn.AvgPool{n}d(2, padding=1)($0)",
        "F.avg_pool2d($0, 2, divisor_override=3)" if n == 2 else f"F.avg_pool{n}d($0, 2)", f"F.lp_pool{min(n, 2)}d($0, 1, 2)" if n < 3 else f"F.max_pool{n}d($0, 2, 1)",
    ]  # fmt: skip


def _resized(g: Builder, x: str) -> list[str]:
    _, _, n = _sides(g, x)
    if n not in (1, 2, 3):
        return []
    smooth = {1: "linear", 2: "bilinear", 3: "trilinear"}[n]
    codes = [
        "F.interpolate($0, scale_factor=2)",
        f"F.interpolate($0, scale_factor=1.5, mode='{smooth}')",
        f"F.interpolate($0, size={[3] * n}, mode='{smooth}', align_corners=True)",
        "F.interpolate($0, scale_factor=0.5, mode='area')",
        "F.interpolate($0, scale_factor=2, mode='nearest-exact')",
    ]
    if n == 2:
        codes += [
            "F.interpolate($0, size=(5, 5), mode='bicubic')",
            "F.interpolate($0, size=(3, 3), mode='bilinear', antialias=True)",
            "F.interpolate($0, size=(3, 3), mode='bicubic', antialias=True)",
            "F.interpolate($0, size=$0.shape[2:], mode='bilinear')",
        ]
    return codes


def _padded(g: Builder, x: str) -> list[str]:
    _, _, n = _sides(g, x)
    if n not in (1, 2, 3):
        return ["F.pad($0, (0, 2))", "F.pad($0, (1, 0), value=0.5)"]
    ones = ", ".join(["1"] * (2 * n))
    codes = [
        f"F.pad($0, ({ones}))",
        f"F.pad($0, ({ones}), mode='replicate')",
        f"F.pad($0, ({ones}), mode='circular')",
        f"F.pad($0, ({ones}), mode='reflect')",
        f"F.pad($0, ({ones}), value=0.5)",
        "F.pad($0, (0, 1))",
        "F.pad($0, (-1, 0))",
    ]
    codes += [
        f"F.pad($0, ({'0, ' * (2 * n)}1, 2))",
        f"F.pad($0, ({'0, ' * (2 * n)}0, -1))",
        "F.pad($0, (0, $0.shape[-1] % 2))",
        f"nn.ZeroPad{n}d(1)($0)",
        f"nn.ReflectionPad{n}d(1)($0)",
        f"nn.ReplicationPad{n}d(1)($0)",
        f"nn.ConstantPad{n}d(1, 0.25)($0)",
    ]
    return codes


def _numbers(g: Builder, x: str) -> list[str]:
    return [
        "$0 * 2", "$0 / 3", "0.5 * $0", "-$0", "$0.neg()", "$0 + 1", "$0 - 0.5", "1 - $0", "0.5 - $0", "2 - $0", "2 + $0", "$0 * -0.5", "torch.add($0, 1, alpha=0.5)", "torch.sub($0, 2, alpha=0.5)", "torch.rsub($0, 1, alpha=2)",
        "torch.true_divide($0, 2)", "torch.multiply($0, 3)", "torch.divide($0, 4)", "$0 + $0", "$0 + $0", "$0 - 3 * $0", "torch.add($0, $0, alpha=2)", "torch.sub($0, $0, alpha=3)", "torch.negative($0)", "$0 * torch.tensor(0.5)",
        "$0 / $0.shape[-1]", "$0 * $0.shape[0]", "$0 + $0.shape[-1]", "$0 - len($0)", "$0 / $0.shape[-1] ** 0.5", "$0 / torch.tensor(float($0.shape[-1]))", "$0 + torch.full((1,), $0.shape[0], dtype=torch.float64)", "$0 * $0.numel() / 100", "torch.add($0, 1, alpha=$0.shape[0])", "$0 / $0.shape[1]",
    ]  # fmt: skip


def _turned_around(g: Builder, x: str) -> list[str]:
    return [
        "1 - $0",
        "$0 + $0",
        "torch.add($0, $0, alpha=2)",
        "torch.sub($0, $0, alpha=3)",
        "2 - $0",
        "torch.rsub($0, 1, alpha=2)",
    ]


def _parameters(g: Builder, x: str) -> list[str]:
    _rank, channels, n = _sides(g, x)
    size = g.one_of((channels, *[1] * n), (1, channels, *[1] * n), (g.shape(x)[-1],), (1,), ())
    gain, shift = g.parameter(*size, gain=True), g.parameter(*size)
    codes = [
        f"$0 * {gain}",
        f"{gain} * $0",
        f"$0 / ({gain} + 3)",
        f"$0 * {gain}.abs()",
        f"$0 * ({gain} * 2)",
        f"$0 * -{gain}",
        f"$0 / {gain}",
    ]
    codes += [
        f"$0 + {shift}",
        f"$0 - {shift}",
        f"{shift} - $0",
        f"{shift} + $0",
        f"torch.add($0, {shift}, alpha=0.5)",
        f"$0 + 2 * {shift}",
        f"$0 * {gain} + {shift}",
        f"torch.addcmul({shift}, $0, {gain})",
        f"torch.addcmul($0, {gain}, {shift})",
        f"torch.lerp($0, {shift}.expand_as($0), 0.5)",
    ]
    return codes


def _copied(g: Builder, x: str) -> list[str]:
    return [
        "$0.clone()",
        "$0.contiguous()",
        "$0.to(torch.float64)",
        "$0.to(torch.float64, copy=True)",
        "$0.type_as($0)",
        "$0.detach()",
        "F.dropout($0, 0.3, False)",
        "nn.Dropout(0.2).eval()($0)",
        "nn.Identity()($0)",
        "$0.double()",
        "$0.view($0.shape).clone()",
        "torch.asarray($0)",
        "$0 + 0",
        "F.dropout2d($0[..., None, None], 0.5, False)[..., 0, 0]" if len(g.shape(x)) == 2 else "$0.clone()",
        "torch.ops.aten.alias($0)",
        "F.alpha_dropout($0, 0.5, False)",
        "$0[:]",
        "$0[...]",
        "$0.positive()",
        "torch.nn.functional.feature_alpha_dropout($0, 0.5, False)",
        "$0.clone(memory_format=torch.contiguous_format)",
    ]


def _positive(g: Builder, x: str) -> list[str]:
    codes = [
        "F.relu($0)",
        "F.leaky_relu($0, 0.2)",
        "$0.abs()",
        "$0.clamp(min=0)",
        "torch.clamp_min($0, 0)",
        "F.threshold($0, 0, 0)",
        "F.rrelu($0)",
        "$0.clamp(max=0)",
        "torch.maximum($0, 0.5 * $0)",
        "torch.minimum($0, -$0)",
        "torch.max($0, $0.flip(-1))",
        "F.relu($0) - F.relu(-$0)",
        "F.hardtanh($0, 0, 6)",
        "$0.clip(0)",
        "$0.clamp_max(0)",
        "torch.where($0 > 0, $0, 0)",
    ]
    codes += [
        f"F.prelu($0, {g.parameter(g.shape(x)[1])})",
        f"nn.PReLU({g.shape(x)[1]}).double()($0)",
        f"F.prelu($0, {g.parameter(1)})",
    ]
    return codes


def _averaged(g: Builder, x: str) -> list[str]:
    rank, _, n = _sides(g, x)
    rest = tuple(range(2, rank)) or (0,)
    return [
        f"$0.mean({rest})" if n else "$0.mean(1, keepdim=True)",
        f"$0.mean({rest}, keepdim=True)",
        "$0.mean(-1)",
        "$0.mean(1)",
        "$0.mean(1, keepdim=True)",
        "$0.amax(-1)",
        f"$0.amax({rest}, keepdim=True)",
        "$0.amax(1, keepdim=True)",
        "$0.max(-1)[0]",
        "$0.amin(-1)",
        "$0 - $0.mean(-1, keepdim=True)",
        "$0 + $0.mean(1, keepdim=True)",
        "$0 - $0.mean(0)",
        "$0.mean(0, keepdim=True).expand_as($0)",
        "$0.mean().expand(1, 1) + $0.flatten(1)",
        "$0.std(-1)",
        "$0.mean(-1, keepdim=True) * torch.ones_like($0)",
    ]


def _summed(g: Builder, x: str) -> list[str]:
    return [
        "$0.sum(-1)",
        "$0.sum(1)",
        "$0.sum(1, keepdim=True)",
        "$0.sum(-1) / $0.shape[-1]",
        "$0.sum(0, keepdim=True)",
        "$0.sum((1, -1))",
        "torch.stack([$0, $0.flip(-1)]).sum(0)",
        "$0.sum(0) / $0.shape[0]",
        "$0.sum(-1, keepdim=True) + $0",
    ]


def _made_from_shape(g: Builder, x: str) -> list[str]:
    return [
        "$0 + torch.zeros_like($0)",
        "$0 * torch.ones_like($0)",
        "$0 + torch.full_like($0, 0.5)",
        "$0 + $0.new_zeros($0.shape[1:])",
        "$0 * $0.new_full((1,), 2.0)",
        "$0 + torch.linspace(0, 1, $0.shape[-1], dtype=torch.float64)",
        "$0 + torch.arange($0.shape[0]).double().reshape(-1, *[1] * ($0.dim() - 1))",
        "torch.cat([$0, $0.new_zeros($0.shape)], 1)",
        "$0 * torch.eye($0.shape[-1], dtype=torch.float64)[0]",
        "torch.where(torch.ones_like($0, dtype=torch.bool), $0, 0)",
        "$0.masked_fill(torch.zeros_like($0, dtype=torch.bool), 0)",
    ]


def _mixed(g: Builder, x: str) -> list[str]:
    """Sums over positions with weights from elsewhere, and gates."""
    rank, channels, _n = _sides(g, x)
    codes = [
        "$0 * torch.sigmoid($0.mean(-1, keepdim=True))",
        "$0 * torch.sigmoid($0.mean())",
        "$0 * $0.std().exp()",
        "$0 / ($0.abs().mean() + 1)",
    ]
    if rank == 3:
        codes += [
            "torch.softmax($0 @ $0.mT, -1) @ $0",
            "torch.bmm(torch.softmax(torch.bmm($0, $0.mT), 2), $0)",
            "F.scaled_dot_product_attention($0.detach() * 0.1, $0 * 0.1, $0)",
            "torch.einsum('nts,nsc->ntc', torch.softmax($0 @ $0.mT, -1), $0)",
            "torch.matmul($0, torch.softmax($0.mT @ $0, 1))",
            f"{g.parameter(g.shape(x)[1], g.shape(x)[1])} @ $0",
        ]
    if rank == 4:
        codes += [
            "$0 * torch.sigmoid($0.mean((2, 3), keepdim=True))",
            "$0 * $0.mean(1, keepdim=True).sigmoid()",
            "($0.flatten(2) @ torch.softmax($0.mean(1).flatten(1), -1).unsqueeze(-1))",
            f"torch.einsum('nchw,oc->nohw', $0, {g.parameter(channels, channels)})",
            "F.grid_sample($0, torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(1, 2, 2, 2).expand($0.shape[0], -1, -1, -1), padding_mode='border', align_corners=False)",
        ]
    return codes


def _at_places(g: Builder, x: str) -> list[str]:
    """Elements taken from places that a tensor tells, and put or added there."""
    rank, _, _ = _sides(g, x)
    backwards = "torch.arange($0.shape[-1]).flip(0).expand($0.shape)"
    codes = [
        f"$0.gather(-1, {backwards})",
        "$0.gather(0, torch.zeros_like($0[:1], dtype=torch.int64))",
        "$0.index_select(0, $0.flatten(1).sum(1).argsort())",
        "$0[torch.arange($0.shape[0]) % 2 < 1]",
        "torch.zeros_like($0).scatter_add(0, torch.zeros_like($0, dtype=torch.int64), $0)",
        "$0.new_zeros($0.shape).index_add_(0, torch.arange($0.shape[0]) // 2, $0)",
        "$0.index_add(-1, torch.zeros($0.shape[-1], dtype=torch.int64), $0, alpha=0.5)",
        "$0.scatter(-1, torch.zeros_like($0[..., :1], dtype=torch.int64), 0.0)",
        f"torch.zeros($0.shape, dtype=$0.dtype).scatter_reduce(-1, {backwards}, $0, 'mean', include_self=False)",
        f"$0.scatter_reduce(-1, {backwards}, $0, 'amax')",
        "$0.index_copy(0, torch.tensor([0]), $0[-1:])",
    ]
    if rank > 2:
        codes += [
            "$0[torch.arange($0.shape[0])[:, None], :, torch.arange($0.shape[2])]",
            "$0[torch.arange($0.shape[0])[:, None], torch.arange($0.shape[1])]",
            "$0[:, :, torch.zeros(2, 2, dtype=torch.int64)].mean(2)",
        ]
    return codes


def _picked(g: Builder, x: str) -> list[str]:
    """An element of one tensor or of another, by a mask or by size; patches."""
    rank, channels, n = _sides(g, x)
    mask = "(torch.arange($0.shape[-1]) % 2 > 0)"
    codes = [
        f"torch.where({mask}, $0, 0.0)",
        f"torch.where({mask}, $0, $0.flip(-1))",
        f"torch.where({mask}, $0, -float('inf')).amax(-1)",
        f"torch.where({mask}, $0, {g.parameter(*g.shape(x)[1:])})",
        f"torch.where($0.roll(1, 0).sigmoid() > 0.5, $0, {g.parameter(channels, *[1] * n)})",
        f"$0.masked_fill({mask}, 0.0)",
        f"$0.masked_fill({mask}, -float('inf')).amax(-1)",
        f"$0.masked_fill({mask}, 0.5)",
        "$0.masked_fill($0 > 0.3, 0.0)",
        f"torch.maximum($0, {g.parameter(channels, *[1] * n)})",
        "torch.maximum($0, torch.zeros_like($0))",
    ]
    if rank == 4:
        codes += [
            "F.unfold($0, 2)",
            "F.unfold($0, 3, padding=1)",
            "F.fold(F.unfold($0, 2, stride=2), tuple(s // 2 * 2 for s in $0.shape[2:]), 2, stride=2)",
            "F.fold(F.unfold($0, 3, padding=1), $0.shape[2:], 3, padding=1)",
            "F.grid_sample($0, torch.linspace(-1.2, 1.2, 8, dtype=torch.float64).reshape(1, 2, 2, 2).expand($0.shape[0], -1, -1, -1), padding_mode='zeros', align_corners=False)",
            "F.grid_sample($0, torch.linspace(-1.2, 1.2, 8, dtype=torch.float64).reshape(1, 2, 2, 2).expand($0.shape[0], -1, -1, -1), mode='bicubic', padding_mode='reflection', align_corners=True)",
        ]
    if rank == 3:
        codes += ["F.fold($0, (2, $0.shape[-1]), (1, 1)).flatten(2)"] * (g.shape(x)[2] % 2 == 0)
    return codes


def _composed(g: Builder, x: str) -> list[str]:
    """Operators that are made of others, with parameters among their operands."""
    rank, channels, n = _sides(g, x)
    along = (channels, *[1] * n)
    gain, shift, share = g.parameter(*along, gain=True), g.parameter(*along), g.parameter(*along)
    last = g.shape(x)[-1]
    codes = [
        f"torch.addcmul({shift}, $0, {gain}, value=0.5)",
        f"torch.addcdiv({shift}, $0, {gain}, value=2)",
        f"torch.addcmul($0, $0.flip(-1), {gain})",
        f"torch.lerp($0, $0.flip(-1), {share})",
        "torch.lerp($0, $0.roll(1, 1), 0.3)",
        "torch.vstack([$0, $0])",
        "torch.dstack([$0, $0.flip(-1)])",
        "torch.repeat_interleave($0, 2, -1)",
        "torch.repeat_interleave($0, 3, 1)",
        f"torch.tensordot($0, {g.parameter(last, 3)}, 1)",
        f"torch.inner($0, {g.parameter(4, last)})",
        f"$0 @ {g.parameter(last, 3)}",
        f"torch.softmax($0.detach().sin(), -1) @ {g.parameter(last, 3)}",
        "torch.outer($0.flatten(1)[:, 0], $0.new_ones(3))",
        f"F.rms_norm($0, ({last},), {g.parameter(last)})",
    ]
    if channels > 1:
        codes += ["$0[:, :1] - $0[:, 1:2]", "$0[:, 0] - $0[:, 1]", "$0[:, :1] - 2 * $0[:, 1:]"]
    if rank == 3:
        batch = g.shape(x)[0]
        rows, columns = g.shape(x)[1:]
        codes += [
            f"{g.parameter(3, rows)} @ $0",
            f"{g.parameter(1, 3, rows)} @ $0",
            f"$0 @ {g.parameter(1, columns, 3)}",
            f"torch.baddbmm({g.parameter(3)}, $0, {g.parameter(1, columns, 3)}.expand($0.shape[0], -1, -1), beta=0.5, alpha=2)",
            f"torch.bmm({g.parameter(1, 3, rows)}.repeat($0.shape[0], 1, 1), $0)",
        ]
        codes += [f"torch.bmm($0, {g.parameter(batch, columns, 3)})"] * (batch == 1)
        codes += [f"torch.mv($0[0], {g.parameter(columns)})[None, :, None]"] * (batch == 1)
    return codes
