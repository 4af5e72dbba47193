"""What graphics cards are: memory, bandwidth, matrix rate and link, from their makers' data sheets.

A row is `name | GiB | GB/s | TFLOP/s | PCIe generation x lanes`. A name with several memory sizes
has a row for each, the one that is taken without a size first. TFLOP/s is the peak dense rate
of 16-bit products summed in 32 bits; where a card has no matrix units, the best rate its ordinary
units have for that. Sources: NVIDIA's architecture white papers (Turing, GA102, Ada, Blackwell RTX,
A100, H100) and data sheets, AMD's and Intel's specification pages, Apple's press releases.
GeForce cards sum in 32 bits at half the rate that the workstation cards of the same chip have: of
the ordinary 32-bit rate, 4 times (Turing) or 2 times (Ampere, Ada, Blackwell), against 8 and 4.
The RTX 3080 with 20 GiB is the one with 10 and larger chips soldered on. Laptop chips vary with
their power limit: the rates of the middle of the range. Knows no machine.
"""

NVIDIA = """
GTX 1050 | 2 | 112 | 1.9 | 3x16
GTX 1050 Ti | 4 | 112 | 2.1 | 3x16
GTX 1060 | 6 | 192 | 4.4 | 3x16
GTX 1060 | 3 | 192 | 3.9 | 3x16
GTX 1070 | 8 | 256 | 6.5 | 3x16
GTX 1070 Ti | 8 | 256 | 8.2 | 3x16
GTX 1080 | 8 | 320 | 8.9 | 3x16
GTX 1080 Ti | 11 | 484 | 11.3 | 3x16
TITAN X | 12 | 480 | 11 | 3x16
TITAN Xp | 12 | 548 | 12.1 | 3x16
Quadro P2000 | 5 | 140 | 3 | 3x16
Quadro P4000 | 8 | 243 | 5.3 | 3x16
Quadro P5000 | 16 | 288 | 8.9 | 3x16
Quadro P6000 | 24 | 432 | 12.6 | 3x16
Tesla M40 | 24 | 288 | 6.8 | 3x16
Tesla M40 | 12 | 288 | 6.8 | 3x16
Tesla P4 | 8 | 192 | 5.5 | 3x16
Tesla P40 | 24 | 347 | 11.8 | 3x16
Tesla P100 | 16 | 732 | 18.7 | 3x16
Tesla P100 | 12 | 549 | 18.7 | 3x16
TITAN V | 12 | 653 | 110 | 3x16
Tesla V100 | 16 | 900 | 112 | 3x16
Tesla V100 | 32 | 900 | 112 | 3x16
GTX 1650 | 4 | 128 | 6 | 3x16
GTX 1650 Super | 4 | 192 | 8.8 | 3x16
GTX 1660 | 6 | 192 | 10 | 3x16
GTX 1660 Super | 6 | 336 | 10 | 3x16
GTX 1660 Ti | 6 | 288 | 10.9 | 3x16
RTX 2060 | 6 | 336 | 25.8 | 3x16
RTX 2060 | 12 | 336 | 28.7 | 3x16
RTX 2060 Super | 8 | 448 | 28.7 | 3x16
RTX 2070 | 8 | 448 | 29.9 | 3x16
RTX 2070 Super | 8 | 448 | 36.3 | 3x16
RTX 2080 | 8 | 448 | 40.3 | 3x16
RTX 2080 Super | 8 | 496 | 44.6 | 3x16
RTX 2080 Ti | 11 | 616 | 53.8 | 3x16
TITAN RTX | 24 | 672 | 130.5 | 3x16
Quadro RTX 3000 | 6 | 336 | 42 | 3x16
Quadro RTX 4000 | 8 | 416 | 57 | 3x16
Quadro RTX 5000 | 16 | 448 | 89.2 | 3x16
Quadro RTX 6000 | 24 | 672 | 130.5 | 3x16
Quadro RTX 8000 | 48 | 672 | 130.5 | 3x16
T1000 | 8 | 160 | 5 | 3x16
T1000 | 4 | 160 | 5 | 3x16
Tesla T4 | 16 | 320 | 65 | 3x16
RTX 3050 | 8 | 224 | 18.2 | 4x8
RTX 3050 | 6 | 168 | 13.5 | 4x8
RTX 3060 | 12 | 360 | 25.5 | 4x16
RTX 3060 | 8 | 240 | 25.5 | 4x16
RTX 3060 Ti | 8 | 448 | 32.4 | 4x16
RTX 3070 | 8 | 448 | 40.6 | 4x16
RTX 3070 Ti | 8 | 608 | 43.5 | 4x16
RTX 3080 | 10 | 760 | 59.5 | 4x16
RTX 3080 | 12 | 912 | 61.3 | 4x16
RTX 3080 | 20 | 760 | 59.5 | 4x16
RTX 3080 Ti | 12 | 912 | 68.2 | 4x16
RTX 3090 | 24 | 936 | 71 | 4x16
RTX 3090 Ti | 24 | 1008 | 80 | 4x16
RTX 3050 Laptop | 4 | 192 | 14 | 4x8
RTX 3050 Ti Laptop | 4 | 192 | 15 | 4x8
RTX 3060 Laptop | 6 | 336 | 24 | 4x16
RTX 3070 Laptop | 8 | 448 | 31 | 4x16
RTX 3070 Ti Laptop | 8 | 448 | 33 | 4x16
RTX 3080 Laptop | 8 | 448 | 37 | 4x16
RTX 3080 Laptop | 16 | 448 | 37 | 4x16
RTX 3080 Ti Laptop | 16 | 512 | 44 | 4x16
RTX A2000 | 6 | 288 | 32 | 4x16
RTX A2000 | 12 | 288 | 32 | 4x16
RTX A4000 | 16 | 448 | 76.7 | 4x16
RTX A4500 | 20 | 640 | 94.6 | 4x16
RTX A5000 | 24 | 768 | 111 | 4x16
RTX A5500 | 24 | 768 | 136 | 4x16
RTX A6000 | 48 | 768 | 154.8 | 4x16
A2 | 16 | 200 | 18 | 4x8
A10 | 24 | 600 | 125 | 4x16
A10G | 24 | 600 | 70 | 4x16
A16 | 16 | 200 | 18 | 4x16
A30 | 24 | 933 | 165 | 4x16
A40 | 48 | 696 | 149.7 | 4x16
A100 | 40 | 1555 | 312 | 4x16
A100 | 80 | 1935 | 312 | 4x16
A100 SXM4 | 40 | 1555 | 312 | 4x16
A100 SXM4 | 80 | 2039 | 312 | 4x16
RTX 4060 | 8 | 272 | 30.2 | 4x8
RTX 4060 Ti | 8 | 288 | 44.1 | 4x8
RTX 4060 Ti | 16 | 288 | 44.1 | 4x8
RTX 4070 | 12 | 504 | 58.3 | 4x16
RTX 4070 Super | 12 | 504 | 71 | 4x16
RTX 4070 Ti | 12 | 504 | 80.2 | 4x16
RTX 4070 Ti Super | 16 | 672 | 88.2 | 4x16
RTX 4080 | 16 | 717 | 97.5 | 4x16
RTX 4080 Super | 16 | 736 | 104.4 | 4x16
RTX 4090 | 24 | 1008 | 165.2 | 4x16
RTX 4090 D | 24 | 1008 | 147 | 4x16
RTX 4050 Laptop | 6 | 192 | 18 | 4x8
RTX 4060 Laptop | 8 | 256 | 27 | 4x8
RTX 4070 Laptop | 8 | 256 | 31 | 4x8
RTX 4080 Laptop | 12 | 432 | 50 | 4x16
RTX 4090 Laptop | 16 | 576 | 66 | 4x16
RTX 2000 Ada | 16 | 224 | 48 | 4x8
RTX 4000 SFF Ada | 20 | 280 | 76.7 | 4x16
RTX 4000 Ada | 20 | 360 | 106.9 | 4x16
RTX 4500 Ada | 24 | 432 | 158 | 4x16
RTX 5000 Ada | 32 | 576 | 261 | 4x16
RTX 5880 Ada | 48 | 960 | 277 | 4x16
RTX 6000 Ada | 48 | 960 | 364 | 4x16
L4 | 24 | 300 | 121 | 4x16
L20 | 48 | 864 | 119.5 | 4x16
L40 | 48 | 864 | 181 | 4x16
L40S | 48 | 864 | 362 | 4x16
H20 | 96 | 4000 | 148 | 5x16
H100 | 80 | 3350 | 989 | 5x16
H100 PCIe | 80 | 2039 | 756 | 5x16
H100 NVL | 94 | 3938 | 835 | 5x16
H200 | 141 | 4800 | 989 | 5x16
H200 NVL | 141 | 4800 | 835 | 5x16
B200 | 180 | 8000 | 2250 | 5x16
B300 | 288 | 8000 | 2250 | 5x16
RTX 5050 | 8 | 320 | 26.3 | 5x8
RTX 5060 | 8 | 448 | 38.4 | 5x8
RTX 5060 Ti | 8 | 448 | 47.4 | 5x8
RTX 5060 Ti | 16 | 448 | 47.4 | 5x8
RTX 5070 | 12 | 672 | 61.7 | 5x16
RTX 5070 Ti | 16 | 896 | 87.9 | 5x16
RTX 5080 | 16 | 960 | 112.6 | 5x16
RTX 5090 | 32 | 1792 | 209.5 | 5x16
RTX 5090 D | 32 | 1792 | 209.5 | 5x16
RTX 5050 Laptop | 8 | 384 | 24 | 5x8
RTX 5060 Laptop | 8 | 384 | 29 | 5x8
RTX 5070 Laptop | 8 | 384 | 36 | 5x8
RTX 5070 Ti Laptop | 12 | 672 | 46 | 5x8
RTX 5080 Laptop | 16 | 896 | 60 | 5x16
RTX 5090 Laptop | 24 | 896 | 76 | 5x16
RTX PRO 2000 | 16 | 288 | 68 | 5x8
RTX PRO 4000 | 24 | 672 | 188 | 5x16
RTX PRO 4500 | 32 | 896 | 219 | 5x16
RTX PRO 5000 | 48 | 1344 | 295 | 5x16
RTX PRO 5000 | 72 | 1344 | 295 | 5x16
RTX PRO 6000 | 96 | 1792 | 503.8 | 5x16
RTX PRO 6000 Max-Q | 96 | 1792 | 438 | 5x16
"""

AMD = """
RX 580 | 8 | 256 | 6.2 | 3x16
RX Vega 56 | 8 | 410 | 21 | 3x16
RX Vega 64 | 8 | 484 | 25.3 | 3x16
VII | 16 | 1024 | 26.9 | 3x16
RX 5600 XT | 6 | 288 | 14.4 | 4x16
RX 5700 | 8 | 448 | 15.9 | 4x16
RX 5700 XT | 8 | 448 | 19.5 | 4x16
RX 6500 XT | 4 | 144 | 11.5 | 4x4
RX 6600 | 8 | 224 | 17.9 | 4x8
RX 6600 XT | 8 | 256 | 21.2 | 4x8
RX 6650 XT | 8 | 280 | 21.6 | 4x8
RX 6700 | 10 | 320 | 22.6 | 4x16
RX 6700 XT | 12 | 384 | 26.4 | 4x16
RX 6750 XT | 12 | 432 | 26.6 | 4x16
RX 6800 | 16 | 512 | 32.3 | 4x16
RX 6800 XT | 16 | 512 | 41.5 | 4x16
RX 6900 XT | 16 | 512 | 46.1 | 4x16
RX 6950 XT | 16 | 576 | 47.3 | 4x16
RX 7600 | 8 | 288 | 43.5 | 4x8
RX 7600 XT | 16 | 288 | 45.1 | 4x8
RX 7700 XT | 12 | 432 | 70.3 | 4x16
RX 7800 XT | 16 | 624 | 74.7 | 4x16
RX 7900 GRE | 16 | 576 | 92 | 4x16
RX 7900 XT | 20 | 800 | 103 | 4x16
RX 7900 XTX | 24 | 960 | 122.8 | 4x16
RX 9060 XT | 8 | 320 | 103 | 5x16
RX 9060 XT | 16 | 320 | 103 | 5x16
RX 9070 GRE | 12 | 432 | 137 | 5x16
RX 9070 | 16 | 640 | 145 | 5x16
RX 9070 XT | 16 | 640 | 195 | 5x16
AI PRO R9700 | 32 | 640 | 191 | 5x16
PRO W6600 | 8 | 224 | 20.8 | 4x8
PRO W6800 | 32 | 512 | 35.7 | 4x16
PRO W7600 | 8 | 288 | 39.9 | 4x8
PRO W7700 | 16 | 576 | 56.5 | 4x16
PRO W7800 | 32 | 576 | 90.5 | 4x16
PRO W7800 | 48 | 864 | 90.5 | 4x16
PRO W7900 | 48 | 864 | 122.6 | 4x16
Instinct MI25 | 16 | 484 | 24.6 | 3x16
Instinct MI50 | 16 | 1024 | 26.5 | 4x16
Instinct MI50 | 32 | 1024 | 26.5 | 4x16
Instinct MI60 | 32 | 1024 | 29.5 | 4x16
Instinct MI100 | 32 | 1229 | 184.6 | 4x16
Instinct MI210 | 64 | 1638 | 181 | 4x16
Instinct MI250X | 64 | 1638 | 191.5 | 4x16
Instinct MI300X | 192 | 5300 | 1307 | 5x16
Instinct MI325X | 256 | 6000 | 1307 | 5x16
Instinct MI350X | 288 | 8000 | 2300 | 5x16
Instinct MI355X | 288 | 8000 | 2500 | 5x16
"""
"""An MI250X is two devices to every program; its row is one of them."""

INTEL = """
Arc A310 | 4 | 124 | 25 | 4x8
Arc A380 | 6 | 186 | 33 | 4x8
Arc A580 | 8 | 512 | 98 | 4x16
Arc A750 | 8 | 512 | 115 | 4x16
Arc A770 | 16 | 560 | 131 | 4x16
Arc A770 | 8 | 512 | 131 | 4x16
Arc B570 | 10 | 380 | 101 | 4x8
Arc B580 | 12 | 456 | 116 | 4x8
Arc Pro B50 | 16 | 224 | 85 | 5x8
Arc Pro B60 | 24 | 456 | 98 | 5x8
Arc Pro B70 | 32 | 608 | 183 | 5x16
"""

APPLE = """
M1 | 16 | 68 | 2.6 | 4x16
M1 Pro | 16 | 200 | 5.3 | 4x16
M1 Max | 32 | 400 | 10.6 | 4x16
M1 Ultra | 64 | 800 | 21.2 | 4x16
M2 | 16 | 100 | 3.6 | 4x16
M2 Pro | 16 | 200 | 6.8 | 4x16
M2 Max | 32 | 400 | 13.6 | 4x16
M2 Ultra | 64 | 800 | 27.2 | 4x16
M3 | 16 | 100 | 3.5 | 4x16
M3 Pro | 18 | 150 | 6.4 | 4x16
M3 Max | 36 | 300 | 10.6 | 4x16
M3 Max | 48 | 400 | 14.2 | 4x16
M3 Ultra | 96 | 819 | 28.4 | 4x16
M4 | 16 | 120 | 4.3 | 4x16
M4 Pro | 24 | 273 | 8.5 | 4x16
M4 Max | 36 | 410 | 14.7 | 4x16
M4 Max | 48 | 546 | 18.4 | 4x16
M5 | 16 | 153 | 16 | 4x16
M5 Pro | 24 | 307 | 32 | 4x16
M5 Max | 36 | 460 | 52 | 4x16
M5 Max | 48 | 614 | 65 | 4x16
"""
"""Unified memory: nothing crosses a link, the column only keeps the form of the table. The rates
of the M5, with matrix units in its GPU, are Apple's "four times the M4"."""

INTEGRATED_NVIDIA = """
GB10 | 128 | 273 | 125 | 5x16
"""

INTEGRATED_AMD = """
780M | 32 | 90 | 16.6 | 4x16
880M | 32 | 120 | 15.5 | 4x16
890M | 32 | 120 | 23.8 | 4x16
8050S | 64 | 256 | 46 | 4x16
8060S | 128 | 256 | 59.4 | 4x16
Ryzen AI Max+ 395 | 128 | 256 | 59.4 | 4x16
"""
