"""ZOGY as the paper writes it, in plain float64 NumPy: slow, whole-frame, cyclic. The oracle of the tests.

Zackay, Ofek & Gal-Yam (2016, ApJ 830, 27). One line an equation, complex FFTs, no tiles, no masks, no shortcuts: what
the package computes another way must agree with this. Nothing here imports the numerics under test.

Model: N = F_n T (x) P_n + noise and R = F_r T (x) P_r + noise, images in electrons, background-subtracted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.fft import fft2, fftfreq, ifft2
from numpy.typing import NDArray

from batchproc.records import Difference, Kernels


@dataclass(frozen=True)
class Reference:
    """Every quantity of the paper by its own name; images ``(ny, nx)`` float64, kernels with their centre on [0, 0]."""

    D: NDArray[np.float64]  # E13
    S: NDArray[np.float64]  # E12
    S_corr: NDArray[np.float64]  # E25
    S_from_D: NDArray[np.float64]  # E17, must equal S
    S_from_k: NDArray[np.float64]  # k_n (x) N - k_r (x) R, must equal S
    V_S: NDArray[np.float64]  # E26 + E27
    V_ast: NDArray[np.float64]  # E30-E33
    V_beta: NDArray[np.float64]  # flux-ratio error
    alpha: NDArray[np.float64]  # E41
    sigma_alpha: NDArray[np.float64]  # E43
    P_D: NDArray[np.float64]  # E14
    P_dN: NDArray[np.float64]  # E129
    P_dR: NDArray[np.float64]  # E133
    k_n: NDArray[np.float64]  # E28
    k_r: NDArray[np.float64]  # E29
    F_D: float  # E15
    F_S: float  # E42


def corner(psf: NDArray, shape: tuple[int, int]) -> NDArray[np.float64]:
    """The odd-sized stamp on an empty frame with its centre on pixel [0, 0]."""
    frame = np.zeros(shape)
    frame[: psf.shape[0], : psf.shape[1]] = psf
    return np.roll(frame, (-(psf.shape[0] // 2), -(psf.shape[1] // 2)), axis=(0, 1))


def stamp(frame: NDArray, size: int) -> NDArray[np.float64]:
    """The inverse of `corner`: an odd square around pixel [0, 0]."""
    return np.roll(frame, (size // 2, size // 2), axis=(0, 1))[:size, :size]


def convolve(image: NDArray, kernel: NDArray) -> NDArray[np.float64]:
    """Cyclic convolution with a kernel whose centre is on [0, 0]."""
    return ifft2(fft2(image) * fft2(kernel)).real


def gradient(image: NDArray) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(d/dx, d/dy) by the exact derivative 2 pi i k; nothing at the Nyquist frequency, whose derivative is not real."""
    ky, kx = (np.where(np.abs(fftfreq(n)) == 0.5, 0.0, fftfreq(n)) for n in image.shape)
    image_hat = fft2(image)
    return ifft2(2j * np.pi * kx[None, :] * image_hat).real, ifft2(2j * np.pi * ky[:, None] * image_hat).real


def stencil_gradient(image: NDArray) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(d/dx, d/dy) by cyclic central differences of eighth order: `gradient` for all that a pixel grid resolves."""

    def along(axis: int) -> NDArray[np.float64]:
        weights = {1: 4 / 5, 2: -1 / 5, 3: 4 / 105, 4: -1 / 280}
        return sum(w * (np.roll(image, -k, axis) - np.roll(image, k, axis)) for k, w in weights.items())

    return along(1), along(0)


def power(acf: NDArray | None, shape: tuple[int, int]) -> NDArray[np.float64] | float:
    """Power spectrum of noise of unit variance with this autocorrelation (odd stamp, 1 in the middle)."""
    return 1.0 if acf is None else fft2(corner(acf, shape)).real


def reference_zogy(
    N: NDArray,
    R: NDArray,
    psf_n: NDArray,
    psf_r: NDArray,
    *,
    sigma_n: float,
    sigma_r: float,
    F_n: float = 1.0,
    F_r: float = 1.0,
    V_n: NDArray | float | None = None,
    V_r: NDArray | float | None = None,
    sig_x: float = 0.0,
    sig_y: float = 0.0,
    sig_beta: float = 0.0,
    acf_n: NDArray | None = None,
    acf_r: NDArray | None = None,
    derivative=gradient,
) -> Reference:
    """All of it.

    ``V_n``, ``V_r``: total variance per pixel (default sigma^2); ``sig_x``, ``sig_y``: registration error in pixels;
    ``sig_beta``: relative error of F_n / F_r; ``acf_n``, ``acf_r``: autocorrelation of the noise of single-pixel rms
    sigma (default white); ``derivative``: `gradient` or `stencil_gradient`.
    """
    shape = N.shape
    V_n = np.broadcast_to(sigma_n**2 if V_n is None else V_n, shape)
    V_r = np.broadcast_to(sigma_r**2 if V_r is None else V_r, shape)
    N_hat, R_hat = fft2(N), fft2(R)
    P_n_hat, P_r_hat = fft2(corner(psf_n, shape)), fft2(corner(psf_r, shape))

    # Correlated noise: its power in the place of sigma^2, in every k.
    Q_n, Q_r = power(acf_n, shape), power(acf_r, shape)
    den = sigma_n**2 * Q_n * F_r**2 * abs(P_r_hat) ** 2 + sigma_r**2 * Q_r * F_n**2 * abs(P_n_hat) ** 2
    den[den == 0] = 1.0  # both PSFs vanish, and all numerators with them

    D_hat = (F_r * P_r_hat * N_hat - F_n * P_n_hat * R_hat) / np.sqrt(den)  # E13
    # E15; with white noise and P^(0) = 1 it is F_r F_n / sqrt(sigma_n^2 F_r^2 + sigma_r^2 F_n^2)
    F_D = F_r * F_n * abs(P_r_hat * P_n_hat)[0, 0] / np.sqrt(den[0, 0])
    P_D_hat = F_r * F_n * P_r_hat * P_n_hat / (F_D * np.sqrt(den))  # E14
    S_hat = (
        F_n * F_r**2 * P_n_hat.conj() * abs(P_r_hat) ** 2 * N_hat
        - F_r * F_n**2 * P_r_hat.conj() * abs(P_n_hat) ** 2 * R_hat
    ) / den  # E12
    D, S = ifft2(D_hat).real, ifft2(S_hat).real

    k_r = ifft2(F_r * F_n**2 * P_r_hat.conj() * abs(P_n_hat) ** 2 / den).real  # E28
    k_n = ifft2(F_n * F_r**2 * P_n_hat.conj() * abs(P_r_hat) ** 2 / den).real  # E29
    S_N, S_R = convolve(N, k_n), convolve(R, k_r)
    # Noise of power Q is white noise convolved with sqrt(Q): so are the kernels that its variance passes through.
    c_n, c_r = (ifft2(fft2(k) * np.sqrt(Q)).real for k, Q in ((k_n, Q_n), (k_r, Q_r)))
    V_S = convolve(V_n, c_n**2) + convolve(V_r, c_r**2)  # E26, E27
    (dSN_dx, dSN_dy), (dSR_dx, dSR_dy) = derivative(S_N), derivative(S_R)
    V_ast = sig_x**2 * (dSN_dx**2 + dSR_dx**2) + sig_y**2 * (dSN_dy**2 + dSR_dy**2)  # E30-E33
    V_beta = sig_beta**2 * S_R**2  # one number multiplies all of R, hence all of S_R

    F_S = (F_n**2 * abs(P_n_hat) ** 2 * F_r**2 * abs(P_r_hat) ** 2 / den).sum() / N.size  # E42, 1/N_pix: Parseval
    norm = np.sqrt(sigma_n**2 * F_r**2 + sigma_r**2 * F_n**2)
    return Reference(
        D=D,
        S=S,
        S_corr=S / np.sqrt(V_S + V_ast + V_beta),  # E25
        S_from_D=ifft2(F_D * D_hat * P_D_hat.conj()).real,  # E17
        S_from_k=S_N - S_R,
        V_S=V_S,
        V_ast=V_ast,
        V_beta=V_beta,
        alpha=S / F_S,  # E41
        sigma_alpha=np.sqrt(V_S) / F_S,  # E43
        P_D=ifft2(P_D_hat).real,
        P_dN=ifft2(P_r_hat * norm / np.sqrt(den)).real,  # E129
        P_dR=ifft2(P_n_hat * norm / np.sqrt(den)).real,  # E133
        k_n=k_n,
        k_r=k_r,
        F_D=float(F_D),
        F_S=float(F_S),
    )


def reference_difference(reference: Reference, *, sigma_n: float, sigma_r: float, psf_size: int) -> Difference:
    """The same as the record that the package hands on: one tile, nothing masked."""
    ny, nx = reference.D.shape
    P_D, delta_new, delta_ref = (stamp(k, psf_size) for k in (reference.P_D, reference.P_dN, reference.P_dR))
    kernels = Kernels(
        x0=0,
        x1=nx,
        y0=0,
        y1=ny,
        psf=P_D / P_D.sum(),
        delta_new=delta_new / np.sqrt(np.sum(delta_new**2)),
        delta_ref=delta_ref / np.sqrt(np.sum(delta_ref**2)),
        f_d=reference.F_D,
        f_s=reference.F_S,
        sigma_new=sigma_n,
        sigma_ref=sigma_r,
    )
    return Difference(
        difference=reference.D,
        score_corr=reference.S_corr,
        flux=reference.alpha,
        flux_err=reference.sigma_alpha,
        mask=np.zeros((ny, nx), np.uint8),
        kernels=(kernels,),
    )
