"""The schedules in 50-digit arithmetic, from the definitions of the papers, without the package."""

from functools import cache

from mpmath import MPContext

mp = MPContext()
mp.dps = 50
mpf = mp.mpf

SIZES = [1, 2, 3, 5, 10, 19, 20, 100, 1000, 4000, 10_000]
FIRST, LAST, LIMIT = mpf("0.0001"), mpf("0.02"), mpf("0.999")
ARBITRARY = [0.3, 1e-9, 0.999999, 0.25, 1e-5, 0.5, 2.0**-40]  # a table that follows no formula


def arbitrary(T):
    """`ARBITRARY` repeated to length T, scaled down so that some signal is left after 10,000 steps."""
    return [ARBITRARY[k % len(ARBITRARY)] / max(1, T // 50) for k in range(T)]


def _line(first, last, k, T):
    return first if T == 1 else first + (last - first) * k / (T - 1)


def _cosine(T):
    f = [mp.cos(mp.pi / 2 * (mpf(k) / T + mpf("0.008")) / (1 + mpf("0.008"))) ** 2 for k in range(T + 1)]
    return [min(1 - f[k + 1] / f[k], LIMIT) for k in range(T)]


BETAS = {  # T -> the T values of beta
    "linear": lambda T: [_line(FIRST, LAST, k, T) for k in range(T)],
    "linear_rescaled": lambda T: [min(_line(FIRST, LAST, k, T) * 1000 / T, LIMIT) for k in range(T)],
    "quadratic": lambda T: [_line(mp.sqrt(FIRST), mp.sqrt(LAST), k, T) ** 2 for k in range(T)],
    "cosine": _cosine,
    "tabulated": lambda T: [mpf(b) for b in arbitrary(T)],
}


@cache
def table(name, T):
    """(beta_1 .. beta_T, alpha_bar_0 .. alpha_bar_T)."""
    beta, alpha_bar = BETAS[name](T), [mpf(1)]
    for b in beta:
        alpha_bar.append(alpha_bar[-1] * (1 - b))
    return beta, alpha_bar


def tabulated(name, T):
    """t -> (alpha², sigma²) of a table: log alpha_bar is linear between the grid's times."""
    alpha_bar = table(name, T)[1]

    def powers(t):
        k = min(int(mp.floor(t * T)), T - 1)
        signal = alpha_bar[k] * (alpha_bar[k + 1] / alpha_bar[k]) ** (t * T - k)
        return signal, 1 - signal

    return powers


def logistic(z):
    return 1 / (1 + mp.exp(-z))


def linear_log_snr(high="13.3", low="-5"):
    return lambda t: (
        logistic(mpf(high) + (mpf(low) - mpf(high)) * t),
        logistic(-mpf(high) - (mpf(low) - mpf(high)) * t),
    )


def sigmoid(start="-3", end="3", width="1", min_signal="1e-9"):
    start, end, width, min_signal = map(mpf, (start, end, width, min_signal))
    v0, v1 = logistic(start / width), logistic(end / width)

    def powers(t):
        noise = (1 - min_signal) * (logistic((start + (end - start) * t) / width) - v0) / (v1 - v0)
        return 1 - noise, noise

    return powers


def variance_exploding(sigma_min="0.01", sigma_max="50"):
    return lambda t: (mpf(1), (mpf(sigma_min) * (mpf(sigma_max) / mpf(sigma_min)) ** t) ** 2)


def flow():
    return lambda t: ((1 - t) ** 2, t**2)


def log_snr(powers):
    return lambda t: mp.log(powers(t)[0] / powers(t)[1])


def normal_bin(low, high):
    """log(Φ(high) − Φ(low)), computed from the tails to keep all digits."""
    if low > 0:
        low, high = -high, -low
    return mp.log((mp.erfc(-high / mp.sqrt(2)) - mp.erfc(-low / mp.sqrt(2))) / 2)
