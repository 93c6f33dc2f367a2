"""A stream that a real QEMU 7.2.22 wrote, for codecs to prove themselves on.

``-M none`` with a RAM block "mem0" of 64 KiB, ``-S``, a UUID and validate-uuid, migrated to ``exec:cat > FILE``.
Pages 3, 4 and 9 have content, the others are zero.
"""

from __future__ import annotations

import base64
import zlib

UUID = bytes.fromhex("00112233445566778899aabbccddeeff")
PAGES = 16
CONTENT = {3: b"A" * 4096, 4: bytes(range(256)) * 16, 9: b"migrated" * 512}

_PACKED = (
    "c-jke4fADSU|?nk5-fT7d8w>I$@zI{ndzlPi6xo&dHSWLnJGXyMg~D8W0%mh@{XCScAvTX?mr_?kcqh{F_!@XSimGB0}D%TYOVp4"
    "0|NqeAk|DD0xH6UPzID%f-)3f3<C|vQ7{Td!6+C7qhJ(_f>AIEM!_f;1*2dT40`|>2XN3}U}R!uVP#|I;N;@w;pO8O5EK#?5fu}c"
    "kd%^^k(HBIP*hS@QB_md(A3h_(bdy8Ff=kYF*P%{u(Yzav9+^zaCCBZadmU|@bvQb@%8f$2n-4i2@MO6h>VJkiH(a-NK8sjNli=7"
    "$jr*l$<50zC@d;2DJ?6nsI024sjaJTXl!b3X>Duo=<Mq5>Fw*EFmcl4DO0CSpD}aR>^XDi&0nx^(c&dbmn~nha@FcJYuBycuyNDo"
    "EnBy3-?4Mo?mc_=?LTnv(BUITj~zd8^3>@wXV0C#aPiXRD_5^wzj5={?K^kx-GA`#(c>pipFMx^^404%Z{NND@bS~<FJHfX|MBzJ"
    "?>~S4{U7!JsQ*X(KkENc|Bw2A)c>RYANBvJ|402l>i<#ykNST^_#X@cU<(5hV2lD7qXEX4ppl!IUX)mpnleg{(xdb!JxY(#qx2{}"
    "N{`Z`^e8<_kJ6*`@TDQ+01IFP0vlkA12Dz~7~=tq@j(f7j{-B&9tDU9cw+-=NoH<p5p3@Q0}fCJ+X%tJot~4Ql$cXo0(2Hs60{qF"
    "tDq<~C$TgyIfH?ApbqQ^HlU5qs+9^7(^KP%GpkaStQ1TPEX{Njlu}a5GLut_fdbLhN_mO7ASorV|CE5TnR!4*=Ow4cXQlwf4S*tL"
    "xy32*80yMWi;6Sz^MGPTKwesAYEBB8k;w(6@g<qb*~RhsX=%l&B_LfTl?7nA%)Ama6OaJZX%@9Q3J9I0d8NgvDah&}BJoM3X=xDa"
    "vFZcan4FWJoK2LCu_$_xB8-S&KvRtf3_~1&0k##{LqPW!8zH&J1jRK)rFn3}VOlUeZ)jiu^h9he0E)b5cK"
)

STREAM = zlib.decompress(base64.b85decode(_PACKED))
